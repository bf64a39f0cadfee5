"""Gradients of the operands, taken a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.blame import naming_row
from graphopt.kernels.chunked_rows.body import Body
from graphopt.kernels.chunked_rows.factors import FactorGradients, Rows
from graphopt.kernels.chunked_rows.operands import Operands, all_classes
from graphopt.kernels.chunked_rows.pieces import Chunk, Piece
from graphopt.kernels.chunked_rows.results import Collected
from graphopt.kernels.chunked_rows.steps import Asked, Cotangents, Pieces, Slopes
from graphopt.kernels.chunked_rows.thinning import ThinGradients, told

_NARROW = (torch.float16, torch.bfloat16)


class Gradients:
    """Gradients of the wanted operands, filled chunk by chunk.

    Those of weights and of ``whole`` are sums over chunks, kept in float32 at least.

    Args:
        operands: the caller's; gradients get their dtypes and layouts.
        wanted: which of them, in the order of ``operands.all``.
        differentiable: which results of the body have a gradient.
        pieces: what runs and differentiates the body.
        threshold: above zero, slopes smaller than that by their row's largest are left out.
    """

    def __init__(
        self,
        body: Body,
        operands: Operands[Tensor],
        wanted: Sequence[bool],
        differentiable: Sequence[bool],
        pieces: Pieces,
        threshold: float = 0.0,
    ) -> None:
        self.body, self.pieces = body, pieces
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

    def _piece(self, piece: Piece, cotangents: Cotangents | None, collected: Collected) -> Slopes:
        """Gradients of the body's tensors."""
        asked = zip(self.wanted.hidden, self.wanted.weight, strict=True)
        wanted = (*(h or w for h, w in asked), *self.wanted.rows, *self.wanted.whole)
        own = None if cotangents is None else self._cut(cotangents, piece.body_span)
        of = Asked(wanted, tuple(self.differentiable))
        made, slopes = self.pieces.differentiated(piece.tensors, of, own)
        if cotangents is None:
            collected.add(made, piece.body_span)
        return slopes

    def _cut(self, cotangents: Cotangents, span: slice) -> Cotangents:
        """Those of some rows."""
        rows = sum(self.differentiable[: len(self.body.rows)])
        given = cotangents.given
        return cotangents._replace(given=[*(g[span] for g in given[:rows]), *given[rows:]])

    def made(self) -> list[Tensor]:
        """The gradients of the wanted operands, in order."""
        for factors in self.factors:
            factors.finish()
        told(self.factors)
        pairs = zip(self.operands.all, self.into.all, strict=True)
        return [into.to(t.dtype) for t, into in pairs if into is not None]

    def _take(self, slopes: Slopes, piece: Piece) -> None:
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
