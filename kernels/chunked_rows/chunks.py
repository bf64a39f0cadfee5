"""The loops over chunks of rows: results, and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.blame import naming_row
from graphopt.kernels.chunked_rows.body import Body
from graphopt.kernels.chunked_rows.columns import log_added, none_added
from graphopt.kernels.chunked_rows.gradients import Gradients
from graphopt.kernels.chunked_rows.operands import Operands, all_classes, cast, products
from graphopt.kernels.chunked_rows.pieces import Chunk, spans
from graphopt.kernels.chunked_rows.results import Collected
from graphopt.kernels.chunked_rows.steps import Cotangents, Eager, Pieces


def evaluate(body: Body, operands: Operands[Tensor]) -> list[Tensor]:
    """All results, in one piece."""
    rows, sums, matrices = body([*products(operands), *operands.rows, *operands.whole])
    return [*rows, *sums, *(log_added(none_added(matrix), matrix) for matrix in matrices)]


class Loop:
    """One pass over the rows, under ``no_grad``.

    Args:
        operands: the caller's.
        chunk_bytes: of the products of a chunk; 0 for the default.
        autocast: the dtype that products are taken in, where the call is under autocast.
        threshold: above zero, gradients are approximate, see `thinning`.
        pieces: what runs the body; default: torch's operators.
    """

    def __init__(
        self,
        body: Body,
        operands: Operands[Tensor],
        chunk_bytes: int,
        autocast: torch.dtype | None = None,
        threshold: float = 0.0,
        pieces: Pieces | None = None,
    ) -> None:
        self.body, self.operands, self.threshold = body, operands, threshold
        self.pieces = pieces or Eager(body)
        self.low = cast(operands, autocast)
        self.spans = list(spans(self.low, chunk_bytes))
        self.count = operands.hidden[0].shape[0] * operands.groups

    def run(self) -> list[Tensor]:
        """Values per row, then sums, then columns."""
        results = Collected(self.count)
        for chunk in self._chunks():
            for piece in chunk.pieces():
                with naming_row(self.body, piece.operands, piece.body_span.start):
                    results.add(self.pieces.results(piece.tensors), piece.body_span)
        return results.whole()

    def run_with_gradients(
        self, wanted: Sequence[bool], differentiable: Sequence[bool]
    ) -> list[Tensor]:
        """As `run`, then the gradients of the wanted operands for a cotangent of one."""
        found = self._gradients(wanted, differentiable)
        return [*self._fill(found, None).whole(), *found.made()]

    def gradients(
        self, wanted: Sequence[bool], differentiable: Sequence[bool], cotangents: Cotangents
    ) -> list[Tensor]:
        """Gradients of the wanted operands for cotangents of the differentiable results."""
        found = self._gradients(wanted, differentiable)
        self._fill(found, cotangents)
        return found.made()

    def _gradients(self, wanted: Sequence[bool], differentiable: Sequence[bool]) -> Gradients:
        return Gradients(
            self.body, self.operands, wanted, differentiable, self.pieces, self.threshold
        )

    def _fill(self, found: Gradients, cotangents: Cotangents | None) -> Collected:
        results = Collected(self.count)
        for chunk in self._chunks():
            found.chunk(chunk, cotangents, results)
        return results

    def _chunks(self) -> Iterator[Chunk]:
        """One after the other in the same memory, which autograd may record."""
        most = max(span.stop - span.start for span in self.spans)
        pairs = zip(self.low.hidden, self.low.weight, strict=True)
        with torch.inference_mode(False):
            rooms = [h.new_empty((most, all_classes(w).shape[0])) for h, w in pairs]
        return (Chunk(self.low, span, rooms) for span in self.spans)
