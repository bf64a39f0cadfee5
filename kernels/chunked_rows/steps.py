"""What a body gives on a piece of rows, and its gradients there: by autograd, in eager mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.body import Body, Results
from graphopt.kernels.chunked_rows.columns import slope_of

_AUTOGRAD_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView")


class Cotangents(NamedTuple):
    """What backward is given.

    Attributes:
        given: of the differentiable results.
        totals: those results of columns themselves, ``(V,)`` each.
    """

    given: Sequence[Tensor]
    totals: Sequence[Tensor] = ()


class Asked(NamedTuple):
    """What is differentiated.

    Attributes:
        wanted: for each of the body's tensors, whether its gradient is.
        differentiable: which results have one.
    """

    wanted: tuple[bool, ...]
    differentiable: tuple[bool, ...]


Slopes = list[Tensor | None]
"""Gradients of the body's tensors; ``None`` where there is none."""


class Pieces(Protocol):
    """What runs a body on pieces of rows."""

    def results(self, tensors: Sequence[Tensor]) -> Results: ...

    def differentiated(
        self, tensors: Sequence[Tensor], asked: Asked, cotangents: Cotangents | None
    ) -> tuple[Results, Slopes]: ...


class Eager:
    """Pieces by torch's operators; what a body computes is the piece's own, to write over."""

    def __init__(self, body: Body) -> None:
        self.body = body.fused

    def results(self, tensors: Sequence[Tensor]) -> Results:
        return self.body([*tensors])

    def differentiated(
        self, tensors: Sequence[Tensor], asked: Asked, cotangents: Cotangents | None
    ) -> tuple[Results, Slopes]:
        """See `differentiated`."""
        return differentiated(self.body, tensors, asked, cotangents)


def differentiated(
    body: Body, tensors: Sequence[Tensor], asked: Asked, cotangents: Cotangents | None
) -> tuple[Results, Slopes]:
    """Results, without a history, and gradients.

    Args:
        tensors: of the body; it may write over matrices where it is a `Body.fused` one.
        cotangents: of these rows; ``None`` is one for each result.
    """
    with recording():
        asking = zip(tensors, asked.wanted, strict=True)
        leaves = [t.detach().requires_grad_(w) for t, w in asking]
        results = body([*leaves])
        made = Results(*([t.detach() for t in g] for g in results))
        pairs = _pairs(results, asked.differentiable, cotangents)
        return made, _slopes(leaves, [p for p in pairs if p[0].requires_grad])


def _pairs(
    results: Results, differentiable: Sequence[bool], cotangents: Cotangents | None
) -> list[tuple[Tensor, Tensor]]:
    """The differentiable results, each with its cotangent."""
    flags = iter(differentiable)
    rows, sums, matrices = ([t for t in group if next(flags)] for group in results)
    if cotangents is None:
        return [(g, torch.ones_like(g)) for g in (*rows, *sums)]
    given = iter(cotangents.given)
    pairs = [(result, next(given)) for result in (*rows, *sums)]
    for matrix, total in zip(matrices, cotangents.totals, strict=True):
        pairs.append((matrix, slope_of(matrix.detach(), total, next(given))))
    return pairs


def _slopes(leaves: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> Slopes:
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs or not asked:
        return [None] * len(leaves)
    outputs, cotangents = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, asked, cotangents, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


@contextmanager
def recording() -> Iterator[None]:
    """Autograd for what an operator does inside, wherever the operator is called.

    Compiled inference graphs run below autograd's dispatch keys, where ``enable_grad`` alone
    records nothing and gradients would silently be zero.
    """
    keys = torch._C.DispatchKey
    with torch.inference_mode(False), torch._C._PreserveDispatchKeyGuard(), torch.enable_grad():
        for name in _AUTOGRAD_KEYS:
            torch._C._dispatch_tls_set_dispatch_key_excluded(getattr(keys, name), False)
        yield
