"""GPTQ: codes chosen one input after the other, what is lost made good on the inputs to come.

Frantar, Ashkboos, Hoefler & Alistarh 2023, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", algorithm 1: with H the second moment of the inputs of
``y = x @ W.T`` and U the upper Cholesky factor of its inverse, column k of W is rounded to q, and
``(W[:, k] - q) / U[k, k] * U[k, k:]`` is subtracted from the columns to come, so that the squared
error of y grows least. H gets a damping on its diagonal; updates of far columns wait for a block.

Here columns that matter most come first within their group, and groups that matter most come first
(so that the stored order stays that of the inputs, and a group finds its scales on the numbers that
are left for it). Then codes and scales are refined in turn (see `refine`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.quantized import codes as coding
from graphopt.kernels.quantized import scales as scaling
from graphopt.kernels.quantized.refine import Rounded, refined
from graphopt.kernels.quantized.rounding import Clip, check_weight, find_scales
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight


class Settings(NamedTuple):
    """Damping, as a share of the mean of H's diagonal; columns of a block; whether columns that
    matter most come first; and how often codes and scales are refined."""

    damping: float = 0.01
    block: int = 128
    ordered: bool = True
    refinements: int = 2


def gptq(
    weight: Tensor,
    scheme: Scheme,
    moment: Tensor,
    clip: Clip = "search",
    settings: Settings = Settings(),  # noqa: B008 - a constant
) -> QuantizedWeight:
    """A weight ``(N, K)`` whose product with inputs of a second moment is off by little.

    Args:
        moment: ``(K, K)``, float32: the sum or mean of ``x x.T`` over the inputs.
        clip: how the scales of a group are found, as in `rounding.quantize`; a search counts the
            squared error of each input by the diagonal of the moment.

    Raises:
        ValueError: the weight cannot be quantized, or the moment is no finite ``(K, K)``.
    """
    check_weight(weight, scheme)
    _check_moment(moment, weight.shape[1])
    return _Rounds(weight.detach(), scheme, moment, clip, settings).run()


def _check_moment(moment: Tensor, width: int) -> None:
    if moment.shape != (width, width):
        raise ValueError(f"the moment is {tuple(moment.shape)}; the weight has K = {width}")
    if not moment.isfinite().all() or bool((moment.diagonal() < 0).any()):
        raise ValueError("the moment holds NaN, infinity or a negative mean square")


class _Rounds:
    """One weight on its way. Numbers are held input by input, ``(K, N)``, in order of rounding."""

    def __init__(
        self, weight: Tensor, scheme: Scheme, moment: Tensor, clip: Clip, settings: Settings
    ) -> None:
        self.scheme, self.settings, self.search = scheme, settings, clip == "search"
        self.outer = scaling.tensor_scale(weight, scheme)
        self.groups = scheme.groups(weight.shape[1])
        self.size = weight.shape[1] // self.groups
        self.diagonal = moment.diagonal().to(torch.float32)
        self.order = _order(self.diagonal, self.groups, ordered=settings.ordered)
        self.moment = damped(moment.to(torch.float32)[self.order][:, self.order], settings.damping)
        self.weight = weight.to(torch.float32).t()[self.order]
        shape = (self.groups, weight.shape[0])
        self.scales = weight.new_empty(shape, dtype=torch.float32)
        self.zeros = None if scheme.symmetric else torch.empty_like(self.scales)

    def run(self) -> QuantizedWeight:
        left, factor = self.weight.clone(), inverse_factor(self.moment)
        codes: Tensor | None = None
        for group in range(self.groups):
            columns = slice(group * self.size, (group + 1) * self.size)
            self._find(group, left[columns], columns)
            for start in range(columns.start, columns.stop, self.settings.block):
                block = slice(start, min(start + self.settings.block, columns.stop))
                made = self._round(group, left, factor, block)
                codes = left.new_empty(left.shape, dtype=made.dtype) if codes is None else codes
                codes[block] = made
        assert codes is not None  # a weight has a group
        found = Rounded(codes, self.scales, self.zeros)
        return self._stored(
            refined(self.weight, self.moment, found, self.scheme, self.settings.refinements)
        )

    def _find(self, group: int, numbers: Tensor, columns: slice) -> None:
        """Scales and zeros of a group, as they will be read back."""
        counts = self.diagonal[self.order[columns]] if self.search else None
        scales, zeros = find_scales(
            numbers.t().contiguous()[:, None],
            self.scheme,
            search=self.search,
            importance=counts,
            outer=self.outer,
        )
        self.scales[group] = scaling.kept(scales.flatten(), self.scheme)
        if self.zeros is not None and zeros is not None:
            self.zeros[group] = scaling.kept(zeros.flatten(), self.scheme)

    def _round(self, group: int, left: Tensor, factor: Tensor, block: slice) -> Tensor:
        """Codes of a block of columns; the columns behind it take up what is lost."""
        scales, zeros = self.scales[group], None if self.zeros is None else self.zeros[group]
        numbers, inner = left[block], factor[block, block]
        lost, codes = torch.empty_like(numbers), []
        for k in range(len(numbers)):
            code = coding.encode(numbers[k], scales, zeros, self.scheme)
            codes.append(code)
            lost[k] = (numbers[k] - coding.decode(code, scales, zeros, self.scheme)) / inner[k, k]
            numbers[k + 1 :].addr_(inner[k, k + 1 :], lost[k], alpha=-1)
        left[block.stop :].addmm_(factor[block, block.stop :].t(), lost, alpha=-1)
        return torch.stack(codes)

    def _stored(self, made: Rounded) -> QuantizedWeight:
        back = self.order.argsort()
        group_order = self.order[:: self.size] // self.size
        places = group_order.argsort()
        scales = scaling.store(made.scales[places].t().contiguous(), self.scheme, self.outer)
        zeros = None
        if made.zeros is not None:
            zeros = made.zeros[places].t().contiguous().to(scales.dtype)
        codes = made.codes[back].t().contiguous()
        return QuantizedWeight.from_codes(codes, scales, zeros, self.scheme, self.outer)


def _order(diagonal: Tensor, groups: int, *, ordered: bool) -> Tensor:
    """Inputs in the order of rounding: groups whole, in both the largest mean squares first."""
    if not ordered:
        return torch.arange(len(diagonal), device=diagonal.device)
    grouped = diagonal.view(groups, -1)
    inner = grouped.argsort(dim=1, descending=True, stable=True)
    outer = grouped.amax(1).argsort(descending=True, stable=True)
    size = grouped.shape[1]
    return (inner[outer] + outer[:, None] * size).flatten()


def damped(moment: Tensor, share: float) -> Tensor:
    """The moment with a share of its mean diagonal added to it; inputs never seen count as one."""
    diagonal = moment.diagonal()
    mean = diagonal.mean()
    extra = torch.where(diagonal == 0, torch.where(mean > 0, mean, 1.0), share * mean)
    return moment + torch.diag(extra)


def inverse_factor(moment: Tensor) -> Tensor:
    """The upper Cholesky factor U of the inverse, ``U.T @ U``, in float64 where float32 fails."""
    lower, failed = torch.linalg.cholesky_ex(moment)
    if failed:
        lower = torch.linalg.cholesky(moment.double())
    inverse = torch.cholesky_inverse(lower)
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if failed:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment.double()))
        upper = torch.linalg.cholesky(inverse, upper=True)
    return upper.to(torch.float32)
