"""Calls of the cross-entropy operator, the same in eager mode on whole logits, and distances."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.kernels.cross_entropy import cross_entropy_rows

OPTIONS = ("bias", "softcap", "ignore", "smoothing", "z_loss", "entropy", "sums", "int32", "turned")
ALONE_AND_IN_PAIRS = [(), *((o,) for o in OPTIONS), *combinations(OPTIONS, 2)]
SIZES = [(5, 123, 7), (123, 257, 33), (5, 1000, 64)]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""Of gradients: 1 % of an error fails by far; narrow ones are rounded once, or twice."""


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    filter_threshold: float = 0.0,
) -> Tensor:
    """``(N,)`` losses in float32, zero where the target is ignored; to be reduced by the caller.

    With logits ``z``, smoothing ``s`` and ``Z = logsumexp(z)`` a loss is
    ``Z - (1 - s) z[target] - s mean(z) + z_loss Z^2``.

    Args:
        filter_threshold: above zero, gradients are approximate, see `filtering`.
    """
    smooth = label_smoothing > 0
    lse, own, total, _, _ = cross_entropy_rows(
        hidden, weight, target, bias, softcap, ignore_index, smooth, False, False, filter_threshold
    )
    loss = lse - (1 - label_smoothing) * own
    if smooth:
        loss = loss - label_smoothing / weight.shape[0] * total
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss.where(target != ignore_index, 0.0)


@dataclass(frozen=True)
class Call:
    """Operands, and what is asked of them; options are those of `OPTIONS`."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    options: frozenset[str]
    filter_threshold: float = 0.0

    @property
    def softcap(self) -> float | None:
        return 5.0 if "softcap" in self.options else None

    @property
    def ignore_index(self) -> int:
        """A class that exists, as where padding has one."""
        return 2 if "ignore" in self.options else -100

    @property
    def smoothing(self) -> float:
        return 0.1 if "smoothing" in self.options else 0.0

    @property
    def z_loss(self) -> float:
        return 0.01 if "z_loss" in self.options else 0.0

    @property
    def leaves(self) -> list[Tensor]:
        tensors = (self.hidden, self.weight, self.bias)
        return [t for t in tensors if t is not None and t.requires_grad]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Call:
        """A copy; leaves stay leaves."""

        def copied(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            made = tensor.detach().to(device, dtype, copy=True)
            return made.requires_grad_(tensor.requires_grad)

        h, w, b = map(copied, (self.hidden, self.weight, self.bias))
        assert h is not None and w is not None
        return replace(self, hidden=h, weight=w, bias=b, target=self.target.to(device))

    def losses(self) -> Tensor:
        return cross_entropy(
            self.hidden,
            self.weight,
            self.target,
            self.bias,
            softcap=self.softcap,
            ignore_index=self.ignore_index,
            label_smoothing=self.smoothing,
            z_loss=self.z_loss,
            filter_threshold=self.filter_threshold,
        )

    def rows(self) -> Sequence[Tensor]:
        """All five summaries."""
        operands = (self.hidden, self.weight, self.target, self.bias)
        settings = (self.softcap, self.ignore_index, True, True, True, self.filter_threshold)
        return cross_entropy_rows(*operands, *settings)

    def results(self) -> list[Tensor]:
        """The losses, and the entropies and sums of logits where they are among the options."""
        found = [self.losses()]
        if self.options & {"entropy", "sums"}:
            _, _, sums, entropies, _ = self.rows()
            found += [entropies] * ("entropy" in self.options) + [sums] * ("sums" in self.options)
        return found

    def logits(self) -> Tensor:
        made = F.linear(self.hidden, self.weight, self.bias)
        return made if self.softcap is None else self.softcap * torch.tanh(made / self.softcap)

    def dense_rows(self) -> list[Tensor]:
        z = self.logits()
        own = z.gather(1, self.target.long().clamp(0)[:, None]).squeeze(1)
        own = torch.where(self.target == self.ignore_index, 0, own)
        entropies = -(z.softmax(1) * z.log_softmax(1)).sum(1)
        return [z.logsumexp(1), own, z.sum(1), entropies, z.argmax(1)]

    def dense(self) -> list[Tensor]:
        """As `results`, by torch's own loss."""
        z, target = self.logits(), self.target.long()
        settings = {"ignore_index": self.ignore_index, "label_smoothing": self.smoothing}
        loss = F.cross_entropy(z, target, reduction="none", **settings)
        counted = target != self.ignore_index
        found = [loss + self.z_loss * torch.where(counted, z.logsumexp(1).square(), 0)]
        _, _, sums, entropies, _ = self.dense_rows()
        return found + [entropies] * ("entropy" in self.options) + [sums] * ("sums" in self.options)


def make(n: int, v: int, d: int, options: Collection[str] = (), scale: float = 1.0) -> Call:
    """Operands of unit logits times ``scale``, every floating tensor a leaf."""
    hidden = torch.randn(n, d) * scale / d**0.5
    weight = torch.randn(d, v).T if "turned" in options else torch.randn(v, d)
    if "turned" in options:
        hidden = hidden.repeat(1, 2)[:, ::2]
    target = torch.randint(0, v, (n,), dtype=torch.int32 if "int32" in options else torch.int64)
    if "ignore" in options:
        target = target.where(torch.arange(n) % 3 != 1, 2)
    bias = torch.randn(v).requires_grad_() if "bias" in options else None
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    return Call(*leaves, target, bias, frozenset(options))


def weighted(results: Sequence[Tensor]) -> Tensor:
    """One number in which every row of every result counts differently."""
    total = torch.zeros((), dtype=torch.float64)
    for i, result in enumerate(results):
        scale = torch.linspace(-0.7, 2.0 + i, result.numel(), dtype=torch.float64)
        total = total + (result.cpu().double() * scale).sum()
    return total


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    assert found.shape == wanted.shape
    found, wanted = found.detach().cpu().double(), wanted.detach().double()
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor], limit: float) -> None:
    errors = [error(f, w) for f, w in zip(found, wanted, strict=True)]
    assert all(e <= limit for e in errors), errors


def assert_as_dense(call: Call, device: str = "cpu", limit: float | None = None) -> None:
    """Results and gradients against float64 eager mode on the same numbers.

    Results are float32 whatever the operands; gradients are rounded to the operands' dtype.
    """
    here = call.to(call.hidden.dtype, device)
    exact = call.to(torch.float64)
    found, wanted = here.results(), exact.dense()
    assert all(r.dtype == torch.float32 for r in found)
    assert_close(found, wanted, 1e-5)
    gradients = torch.autograd.grad(weighted(found), here.leaves)
    assert [g.dtype for g in gradients] == [t.dtype for t in here.leaves]
    expected = torch.autograd.grad(weighted(wanted), exact.leaves)
    assert_close(gradients, expected, limit or LIMITS[call.hidden.dtype])


def assert_rows_as_dense(call: Call, device: str = "cpu") -> None:
    """All summaries, with cotangents for all four that have a gradient."""
    here, exact = call.to(call.hidden.dtype, device), call.to(torch.float64)
    found, wanted = here.rows(), exact.dense_rows()
    assert found[4].cpu().equal(wanted[4])
    assert_close(found[:4], wanted[:4], 1e-5)
    gradients = torch.autograd.grad(weighted(found[:4]), here.leaves)
    expected = torch.autograd.grad(weighted(wanted[:4]), exact.leaves)
    assert_close(gradients, expected, LIMITS[call.hidden.dtype])
