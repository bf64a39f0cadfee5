"""Heads to run the operator on: the body, the same in eager mode, and operands of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.kernels.chunked_rows import chunked_rows

Dense = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Head:
    """One body.

    Attributes:
        body: as text.
        dense: from the products, rows and whole tensors to the results, in eager mode.
        differentiable: which results have a gradient.
        rows, whole: names of operands that `make` knows.
        products: how many.
    """

    name: str
    body: str
    dense: Dense
    differentiable: tuple[bool, ...]
    rows: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    products: int = 1

    def __str__(self) -> str:
        return self.name


@dataclass
class Call:
    """A head with operands."""

    head: Head
    hidden: list[Tensor]
    weight: list[Tensor]
    rows: list[Tensor]
    whole: list[Tensor]
    chunk_bytes: int = 0
    filter_threshold: float = 0.0

    @property
    def all(self) -> list[Tensor]:
        return [*self.hidden, *self.weight, *self.rows, *self.whole]

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self.all if t.requires_grad]

    def chunked(self) -> list[Tensor]:
        groups = (self.hidden, self.weight, self.rows, self.whole)
        flags = list(self.head.differentiable)
        settings = (self.head.body, self.chunk_bytes, flags)
        return chunked_rows(*groups, *settings, filter_threshold=self.filter_threshold)

    def dense(self) -> list[Tensor]:
        pairs = zip(self.hidden, self.weight, strict=True)
        products = [torch.einsum("nd,...vd->n...v", h, w).flatten(0, -2) for h, w in pairs]
        return self.head.dense(*products, *self.rows, *self.whole)

    def to(self, dtype: torch.dtype) -> Call:
        """A copy whose floating tensors have another dtype."""

        def copied(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)

        groups = (self.hidden, self.weight, self.rows, self.whole)
        copies = (list(map(copied, g)) for g in groups)
        return Call(self.head, *copies, self.chunk_bytes, self.filter_threshold)

    def loss(self, results: Sequence[Tensor]) -> Tensor:
        """One number from all results with a gradient; every row counts differently."""
        total = torch.zeros((), dtype=torch.float64)
        for result, counts in zip(results, self.head.differentiable, strict=True):
            if counts:
                scale = torch.linspace(0.5, 2.0, result.numel(), dtype=torch.float64)
                total = total + (result.double().flatten() * scale).sum()
        return total

    def gradients(self, results: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(results), self.leaves)


def make(head: Head, n: int, v: int, d: int, chunk_bytes: int = 0, groups: int = 0) -> Call:
    """Operands with every floating tensor a leaf that wants its gradient."""
    hidden = [torch.randn(n, d) for _ in range(head.products)]
    several = (groups,) if groups else ()
    weight = [torch.randn(*several, v, d) for _ in range(head.products)]
    n *= groups or 1
    extra = {
        "target": torch.randint(0, v, (n,)),
        "some": torch.randint(0, v, (n,)).where(torch.arange(n) % 3 != 1, -100),
        "index": torch.randint(0, v, (n, 1)),
        "scale": torch.rand(n) + 0.5,
        "bias": torch.randn(v),
        "classes": torch.rand(v) + 0.5,
        "heat": torch.tensor(1.7),
    }
    groups = [hidden, weight, [extra[k] for k in head.rows], [extra[k] for k in head.whole]]
    for tensor in (t for group in groups for t in group):
        tensor.requires_grad_(tensor.is_floating_point() and tensor is not extra["classes"])
    return Call(head, *groups, chunk_bytes)


class Recorder(TorchDispatchMode):
    """Notes the operators that are called and the sizes of the tensors that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = made if isinstance(made, list | tuple) else [made]
        self.names.append(func._schema.name)
        self.sizes += [t.numel() for t in tensors if isinstance(t, Tensor)]
        return made


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    assert found.shape == wanted.shape
    wanted = wanted.double()
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor], limit: float) -> None:
    errors = [error(f, w) for f, w in zip(found, wanted, strict=True)]
    assert all(e <= limit for e in errors), errors


def assert_as_exact(
    found: Sequence[Tensor],
    eager: Sequence[Tensor],
    wanted: Sequence[Tensor],
    limit: float,
    times: float = 1.2,
) -> None:
    """Within the limit, or hardly further off than eager mode in the same dtype."""
    triples = zip(found, eager, wanted, strict=True)
    errors = [(error(f, w), error(e, w)) for f, e, w in triples]
    assert all(mine <= max(limit, times * theirs) for mine, theirs in errors), errors


CROSS_ENTROPY = Head(
    "cross entropy",
    """def body(x, target):
    a = aten.cross_entropy_loss.default(x, target, None, 2)
    return [], [a]""",
    lambda x, target: [F.cross_entropy(x, target, reduction="sum")],
    (True,),
    rows=("target",),
)

PER_ROW = Head(
    "per row, biased, weighted, smoothed, ignoring",
    """def body(x, target, bias, classes):
    a = aten.add.Tensor(x, bias)
    b = aten.cross_entropy_loss.default(a, target, classes, 0, -100, 0.1)
    return [b], []""",
    lambda x, target, bias, classes: [
        F.cross_entropy(x + bias, target, classes, reduction="none", label_smoothing=0.1)
    ],
    (True,),
    rows=("some",),
    whole=("bias", "classes"),
)

Z_LOSS = Head(
    "two sums and an accuracy",
    """def body(x, target):
    a = aten.cross_entropy_loss.default(x, target, None, 2)
    b = aten.logsumexp.default(x, [1])
    c = aten.pow.Tensor_Scalar(b, 2)
    d = aten.sum.default(c)
    e = aten.argmax.default(x, 1)
    f = aten.eq.Tensor(e, target)
    g = aten.sum.default(f)
    return [b, e], [a, d, g]""",
    lambda x, target: [
        x.logsumexp(1),
        x.argmax(1),
        F.cross_entropy(x, target, reduction="sum"),
        x.logsumexp(1).pow(2).sum(),
        (x.argmax(1) == target).sum(),
    ],
    (False, False, True, True, False),
    rows=("target",),
)

SELECTED = Head(
    "selected log-probability, capped, tempered, scaled; log-sum-exp for the record",
    """def body(x, index, scale, heat):
    a = aten.tanh.default(x)
    b = aten.mul.Tensor(a, heat)
    c = aten.log_softmax.int(b, -1)
    d = aten.gather.default(c, 1, index)
    e = aten.squeeze.dim(d, 1)
    f = aten.mul.Tensor(e, scale)
    g = aten.sum.default(f)
    h = aten.logsumexp.default(b, [1])
    return [h], [g]""",
    lambda x, index, scale, heat: [
        (x.tanh() * heat).logsumexp(1),
        ((x.tanh() * heat).log_softmax(-1).gather(1, index).squeeze(1) * scale).sum(),
    ],
    (False, True),
    rows=("index", "scale"),
    whole=("heat",),
)

DISTILLATION = Head(
    "distillation from a second head",
    """def body(x, y, scale):
    a = aten.log_softmax.int(x, 1)
    b = aten.log_softmax.int(y, 1)
    c = aten.sub.Tensor(b, a)
    d = aten.exp.default(b)
    e = aten.mul.Tensor(c, d)
    f = aten.sum.dim_IntList(e, [1])
    g = aten.mul.Tensor(f, scale)
    h = aten.topk.default(x, 2, 1)
    i = item(h, 1)
    return [g, i], []""",
    lambda x, y, scale: [
        F.kl_div(x.log_softmax(1), y.log_softmax(1), reduction="none", log_target=True).sum(1)
        * scale,
        x.topk(2, 1).indices,
    ],
    (True, False),
    rows=("scale",),
    products=2,
)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


PAIRS = Head(
    "rows and columns of tempered similarities, and columns of some rows",
    """def body(x, target, some, heat):
    a = aten.mul.Tensor(x, heat)
    b = aten.cross_entropy_loss.default(a, target, None, 2)
    c = aten.lt.Scalar(some, 0)
    d = aten.unsqueeze.default(c, 1)
    e = aten.masked_fill.Scalar(a, d, -inf)
    f = aten.mul.Tensor(x, 0.5)
    return [], [b], [a, e, f]""",
    lambda x, target, some, heat: [
        F.cross_entropy(x * heat, target, reduction="sum"),
        wide(x * heat).logsumexp(0),
        wide(x * heat)[some >= 0].logsumexp(0),
        wide(x * 0.5).logsumexp(0),
    ],
    (True, True, True, False),
    rows=("target", "some"),
    whole=("heat",),
)

HEADS = (CROSS_ENTROPY, PER_ROW, Z_LOSS, SELECTED, DISTILLATION, PAIRS)
