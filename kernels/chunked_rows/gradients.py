"""Gradients of the operands, taken a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from graphopt.kernels.chunked_rows.body import Body, Results
from graphopt.kernels.chunked_rows.operands import CHUNK_BYTES, Operands, products

_NARROW = (torch.float16, torch.bfloat16)
_AUTOGRAD_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView")


class Gradients:
    """Gradients of the wanted operands, filled chunk by chunk.

    Those of weights and of ``whole`` are sums over chunks, kept in float32 at least.

    Args:
        operands: the caller's; gradients get their dtypes and layouts.
        wanted: which of them, in the order of ``operands.all``.
        differentiable: which results of the body have a gradient.
    """

    def __init__(
        self, operands: Operands[Tensor], wanted: Sequence[bool], differentiable: Sequence[bool]
    ) -> None:
        self.operands, self.wanted = operands, operands.filled(wanted)
        self.differentiable = differentiable
        self.into = Operands(
            _rooms(operands.hidden, self.wanted.hidden, summed=False),
            _rooms(operands.weight, self.wanted.weight, summed=True),
            _rooms(operands.rows, self.wanted.rows, summed=False),
            _rooms(operands.whole, self.wanted.whole, summed=True),
        )

    def chunk(
        self, body: Body, piece: Operands[Tensor], span: slice, cotangents: Sequence[Tensor] | None
    ) -> Results:
        """Run the body on one chunk and take its gradients in; gives what the body gives.

        Args:
            piece: the rows ``span`` of the operands, as the products take them.
            cotangents: of the differentiable results, all rows; ``None`` is one for each.
        """
        with recording():
            tensors = self._leaves(piece)
            edges = [get_gradient_edge(t) if t.requires_grad else None for t in tensors]
            results = body(tensors)
            slopes = self._slopes(edges, results, span, cotangents)
        self._take(slopes, piece, span)
        rows, sums = ([t.detach() for t in group] for group in results)
        return rows, sums

    def made(self) -> list[Tensor]:
        """The gradients of the wanted operands, in order."""
        pairs = zip(self.operands.all, self.into.all, strict=True)
        return [into.to(t.dtype) for t, into in pairs if into is not None]

    def _leaves(self, piece: Operands[Tensor]) -> list[Tensor]:
        """The body's tensors. The graph of a product does not hold the product itself."""
        asked = zip(self.wanted.hidden, self.wanted.weight, strict=True)
        hidden = _leaves(piece.hidden, [h or w for h, w in asked])
        weight = [w.detach() for w in piece.weight]
        rows = _leaves(piece.rows, self.wanted.rows)
        whole = _leaves(piece.whole, self.wanted.whole)
        return [*products(Operands(hidden, weight, rows, whole)), *rows, *whole]

    def _slopes(
        self,
        edges: Sequence[GradientEdge | None],
        results: Results,
        span: slice,
        cotangents: Sequence[Tensor] | None,
    ) -> list[Tensor | None]:
        """Gradients with respect to the body's tensors; ``None`` where there is none."""
        asked = [edge for edge in edges if edge is not None]
        pairs = [p for p in self._pairs(results, span, cotangents) if p[0].requires_grad]
        if not pairs or not asked:
            return [None] * len(edges)
        outputs, slopes = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, asked, slopes, allow_unused=True))
        return [edge if edge is None else next(found) for edge in edges]

    def _pairs(
        self, results: Results, span: slice, cotangents: Sequence[Tensor] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """The differentiable results of a chunk, each with its cotangent."""
        rows, sums = results
        flags = iter(self.differentiable)
        chosen = [r for r in rows if next(flags)], [s for s in sums if next(flags)]
        given = [*chosen[0], *chosen[1]]
        if cotangents is None:
            return [(g, torch.ones_like(g)) for g in given]
        count = len(chosen[0])
        parts = [*(c[span] for c in cotangents[:count]), *cotangents[count:]]
        return list(zip(given, parts, strict=True))

    def _take(self, slopes: Sequence[Tensor | None], piece: Operands[Tensor], span: slice) -> None:
        count = len(piece.hidden)
        for i, slope in enumerate(slopes[:count]):
            if slope is not None:
                self._through_product(i, slope, piece, span)
        rows = [None if into is None else into[span] for into in self.into.rows]
        for slope, into in zip(slopes[count:], (*rows, *self.into.whole), strict=True):
            if slope is not None and into is not None:
                into += slope

    def _through_product(self, i: int, slope: Tensor, piece: Operands[Tensor], span: slice) -> None:
        """Of ``P = h w^T``: to ``h`` goes ``slope w``, to ``w`` goes ``slope^T h``."""
        if (hidden := self.into.hidden[i]) is not None:
            hidden[span] = slope @ piece.weight[i]
        if (weight := self.into.weight[i]) is not None:
            _add_product(weight, slope, piece.hidden[i])


def _add_product(into: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """``into += slope^T hidden``; where ``into`` is wider, a few classes at a time."""
    if into.dtype == slope.dtype:
        into.addmm_(slope.mT, hidden)
        return
    step = max(1, CHUNK_BYTES // max(1, hidden.shape[1] * hidden.element_size()))
    for start in range(0, into.shape[0], step):
        classes = slice(start, start + step)
        into[classes].add_(slope[:, classes].mT @ hidden)


def _rooms(
    tensors: Sequence[Tensor], wanted: Sequence[bool], *, summed: bool
) -> list[Tensor | None]:
    """Zeros in the layout of the wanted tensors; ``None`` for the others."""
    kinds = [torch.float32 if summed and t.dtype in _NARROW else t.dtype for t in tensors]
    asked = zip(tensors, kinds, wanted, strict=True)
    return [torch.zeros_like(t, dtype=kind) if w else None for t, kind, w in asked]


def _leaves(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    return [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]


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
