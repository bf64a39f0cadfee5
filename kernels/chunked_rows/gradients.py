"""Gradients of the operands, taken a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.blame import naming_row
from graphopt.kernels.chunked_rows.body import Body, Results
from graphopt.kernels.chunked_rows.columns import slope_of
from graphopt.kernels.chunked_rows.factors import FactorGradients, Rows
from graphopt.kernels.chunked_rows.operands import Operands, all_classes
from graphopt.kernels.chunked_rows.pieces import Chunk, Piece
from graphopt.kernels.chunked_rows.results import Collected
from graphopt.kernels.chunked_rows.thinning import ThinGradients, told

_NARROW = (torch.float16, torch.bfloat16)
_AUTOGRAD_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView")


class Cotangents(NamedTuple):
    """What backward is given.

    Attributes:
        given: of the differentiable results.
        totals: those results of columns themselves, ``(V,)`` each.
    """

    given: Sequence[Tensor]
    totals: Sequence[Tensor] = ()


class Gradients:
    """Gradients of the wanted operands, filled chunk by chunk.

    Those of weights and of ``whole`` are sums over chunks, kept in float32 at least.

    Args:
        operands: the caller's; gradients get their dtypes and layouts.
        wanted: which of them, in the order of ``operands.all``.
        differentiable: which results of the body have a gradient.
        threshold: above zero, slopes smaller than that by their row's largest are left out.
    """

    def __init__(
        self,
        body: Body,
        operands: Operands[Tensor],
        wanted: Sequence[bool],
        differentiable: Sequence[bool],
        threshold: float = 0.0,
    ) -> None:
        self.body = body
        self.operands, self.wanted = operands, operands.filled(wanted)
        self.differentiable = differentiable
        empty, zeros = torch.empty_like, torch.zeros_like
        self.into = Operands(
            _rooms(operands.hidden, self.wanted.hidden, empty, summed=False),
            _rooms(operands.weight, self.wanted.weight, empty, summed=True),
            _rooms(operands.rows, self.wanted.rows, zeros, summed=False),
            _rooms(operands.whole, self.wanted.whole, zeros, summed=True),
        )
        count = operands.hidden[0].shape[0]
        weights = [None if w is None else all_classes(w) for w in self.into.weight]
        self.factors = [
            ThinGradients(h, w, threshold, count) if threshold > 0 else FactorGradients(h, w)
            for h, w in zip(self.into.hidden, weights, strict=True)
        ]

    def chunk(self, chunk: Chunk, cotangents: Cotangents | None, results: Collected) -> None:
        """Run the body on one chunk and take its gradients and results in.

        Slopes take the memory of the products piece by piece.

        Args:
            cotangents: of all rows; ``None`` is one for each result.
        """
        for piece in chunk.pieces():
            with naming_row(self.body, piece.operands, piece.body_span.start):
                slopes = self._piece(piece, cotangents, results)
            self._take(slopes, piece)
            for factors, rows in self._rows(piece):
                factors.piece(rows)
        for factors, rows in self._rows(chunk):
            factors.chunk(rows)

    def _piece(
        self, piece: Piece, cotangents: Cotangents | None, collected: Collected
    ) -> list[Tensor | None]:
        """Gradients with respect to the body's tensors; ``None`` where there is none."""
        with recording():
            leaves = self._leaves(piece)
            results = self.body.fused([*leaves])
            if cotangents is None:
                made = Results(*([t.detach() for t in g] for g in results))
                collected.add(made, piece.body_span)
            pairs = self._pairs(results, piece.body_span, cotangents)
            return _slopes(leaves, [p for p in pairs if p[0].requires_grad])

    def made(self) -> list[Tensor]:
        """The gradients of the wanted operands, in order."""
        for factors in self.factors:
            factors.finish()
        told(self.factors)
        pairs = zip(self.operands.all, self.into.all, strict=True)
        return [into.to(t.dtype) for t, into in pairs if into is not None]

    def _leaves(self, piece: Piece) -> list[Tensor]:
        """The body's tensors."""
        asked = zip(self.wanted.hidden, self.wanted.weight, strict=True)
        return [
            *_leaves(piece.matrices, [h or w for h, w in asked]),
            *_leaves(piece.operands.rows, self.wanted.rows),
            *_leaves(piece.operands.whole, self.wanted.whole),
        ]

    def _pairs(
        self, results: Results, span: slice, cotangents: Cotangents | None
    ) -> list[tuple[Tensor, Tensor]]:
        """The differentiable results of a chunk, each with its cotangent."""
        flags = iter(self.differentiable)
        rows, sums, matrices = ([t for t in group if next(flags)] for group in results)
        if cotangents is None:
            return [(g, torch.ones_like(g)) for g in (*rows, *sums)]
        given = iter(cotangents.given)
        pairs = [(row, next(given)[span]) for row in rows]
        pairs += [(total, next(given)) for total in sums]
        for matrix, total in zip(matrices, cotangents.totals, strict=True):
            pairs.append((matrix, slope_of(matrix.detach(), total, next(given))))
        return pairs

    def _take(self, slopes: Sequence[Tensor | None], piece: Piece) -> None:
        """Slopes take the place of products; gradients of the other tensors are taken in."""
        count = len(piece.products)
        asked = zip(self.wanted.hidden, self.wanted.weight, strict=True)
        for product, slope, wanted in zip(piece.matrices, slopes[:count], asked, strict=True):
            if any(wanted):
                _put(slope, product)
        rows = [None if into is None else into[piece.body_span] for into in self.into.rows]
        for slope, into in zip(slopes[count:], (*rows, *self.into.whole), strict=True):
            if slope is not None and into is not None:
                into += slope

    def _rows(self, part: Piece | Chunk) -> Iterator[tuple[FactorGradients, Rows]]:
        """Of each product with a wanted factor, whose slopes are in its place."""
        pairs = zip(part.operands.hidden, part.operands.weight, strict=True)
        trios = zip(self.factors, part.products, pairs, strict=True)
        for factors, slope, (hidden, weight) in trios:
            if factors.is_wanted:
                yield factors, Rows(part.span, slope, hidden, all_classes(weight))


def _slopes(
    leaves: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor | None]:
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs or not asked:
        return [None] * len(leaves)
    outputs, cotangents = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, asked, cotangents, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _put(slope: Tensor | None, product: Tensor) -> None:
    """A slope in place of its product, where it is not there already."""
    if slope is None:
        product.zero_()
    elif slope.data_ptr() != product.data_ptr():
        product.copy_(slope)


def _rooms(
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    make: Callable[..., Tensor],
    *,
    summed: bool,
) -> list[Tensor | None]:
    """In the layout of the wanted tensors (several matrices one after the other); ``None`` for the
    others."""

    def room(tensor: Tensor) -> Tensor:
        kind = torch.float32 if summed and tensor.dtype in _NARROW else tensor.dtype
        kept = torch.contiguous_format if tensor.dim() == 3 else torch.preserve_format
        return make(tensor, dtype=kind, memory_format=kept)

    return [room(t) if w else None for t, w in zip(tensors, wanted, strict=True)]


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
