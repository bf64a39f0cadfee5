"""Columns of a matrix, with a gradient, from one softmax in one buffer.

For ``x (n, V)`` with ``m = max x`` and ``p = softmax(x)``, ``log sum exp(x) = m - log(max p)``: the
largest ``p`` is at the largest ``x``, and at least ``1 / V``. The slope of columns with cotangents
``g`` is ``g_norm p + scatter(g_own) + g_total + g_weighted w``, written over ``p``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Wanted(NamedTuple):
    """What is taken beside the log-sum-exp, and where.

    Attributes:
        places: classes to pick, ``(n, k)``.
        weight: of the classes, ``(V,)``, for a weighted sum; has no gradient.
        total: whether the sum of each row is asked for.
        top: whether the largest of each row is.
        normalised: whether ``x - norm`` is. Without it a row that has an inf is one to
            ``logsumexp``: its norm is inf, its slope NaN there and zero elsewhere.
        in_place: whether ``x`` may be written over.
    """

    places: Tensor | None
    weight: Tensor | None
    total: bool
    top: bool
    normalised: bool
    in_place: bool


class Columns(NamedTuple):
    """``(n, 1)`` each, but ``own (n, k)``; float32, or float64 for float64.

    Attributes:
        norm: ``log sum exp``; NaN in rows without a softmax where ``log_softmax`` is asked for.
        own: the picked numbers.
        peak: the largest number, as a constant.
        top: the same, with its gradient.
        places: which were picked.
        classes: V.
        best: where the largest number is, first of equals.
    """

    norm: Tensor
    peak: Tensor
    own: Tensor | None
    total: Tensor | None
    weighted: Tensor | None
    top: Tensor | None
    places: Tensor | None
    classes: int
    best: Tensor | None = None


def columns(x: Tensor, wanted: Wanted) -> Columns:
    """Columns of ``x (n, V)``, ``V > 0``."""
    norm, peak, own, total, weighted, top = _Softmax.apply(x, wanted)
    return Columns(norm, peak, own, total, weighted, top, wanted.places, x.shape[1])


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wanted: Wanted) -> Any:
        ctx.set_materialize_grads(False)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        peak = wide.amax(1, keepdim=True)
        own = None if wanted.places is None else wide.gather(1, wanted.places)
        total = wide.sum(1, keepdim=True) if wanted.total else None
        weighted = None
        if wanted.weight is not None:
            weighted = (wide * wanted.weight).sum(1, keepdim=True)
        ctx.kind, ctx.wanted, ctx.ties = x.dtype, wanted, None
        if wanted.top and ctx.needs_input_grad[0]:
            ctx.ties = wide == peak
        infinite = None if wanted.normalised else _infinite(wide, peak)
        free = wide.is_contiguous() and (wanted.in_place or wide.dtype != x.dtype)
        ctx.softmax = _softmax(wide, wide if free else torch.empty_like(wide))
        if infinite is not None:
            rows, slope = infinite
            ctx.softmax[rows] = slope
        norm = peak - ctx.softmax.amax(1, keepdim=True).log()
        if not wanted.normalised:
            norm = norm.where(peak.isfinite(), peak)
        ctx.mark_non_differentiable(peak)
        return norm, peak, own, total, weighted, peak.clone() if wanted.top else None

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        """Once: the slope takes the buffer of the softmax."""
        slope, ctx.softmax = ctx.softmax, None
        norm, _, own, total, weighted, top = given
        if norm is None:
            slope.zero_()
        else:
            slope.mul_(norm)
        if total is not None:
            slope.add_(total)
        if weighted is not None:
            slope.addcmul_(weighted, ctx.wanted.weight.to(slope.dtype))
        if top is not None:
            slope.add_(ctx.ties * (top / ctx.ties.sum(1, keepdim=True)))
        if own is not None:
            slope.scatter_add_(1, ctx.wanted.places, own)
        return slope.to(ctx.kind), None


def _infinite(x: Tensor, peak: Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows that have an inf, and what stands for their softmax: NaN there, zero elsewhere."""
    rows = (peak == torch.inf).squeeze(1).nonzero().squeeze(1)
    if not len(rows):
        return None
    some = x[rows]
    return rows, torch.zeros_like(some).masked_fill_(some == torch.inf, torch.nan)


def _softmax(x: Tensor, out: Tensor) -> Tensor:
    """Over the classes; ``out`` may be ``x``: on a CPU each row is read before it is written."""
    if out is not x or x.device.type == "cpu":
        return torch.softmax(x, 1, out=out)
    x.sub_(x.amax(1, keepdim=True)).exp_()
    return x.div_(x.sum(1, keepdim=True))
