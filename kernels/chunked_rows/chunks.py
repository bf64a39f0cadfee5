"""The loops over chunks of rows: results, and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.body import Body, Results
from graphopt.kernels.chunked_rows.gradients import Gradients
from graphopt.kernels.chunked_rows.operands import Operands, cast, part, products, spans


def evaluate(body: Body, operands: Operands[Tensor]) -> list[Tensor]:
    """All results, in one piece."""
    rows, sums = body([*products(operands), *operands.rows, *operands.whole])
    return [*rows, *sums]


class Loop:
    """One pass over the rows, under ``no_grad``.

    Args:
        operands: the caller's.
        chunk_bytes: of the products of a chunk; 0 for the default.
        autocast: the dtype that products are taken in, where the call is under autocast.
    """

    def __init__(
        self,
        body: Body,
        operands: Operands[Tensor],
        chunk_bytes: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.body, self.operands = body, operands
        self.low = cast(operands, autocast)
        self.spans = list(spans(self.low, chunk_bytes))

    def run(self) -> list[Tensor]:
        """Values per row, then sums."""
        results = _Results()
        for span, piece in self._pieces():
            with naming_row(self.body, piece, span.start):
                results.add(_run(self.body, piece))
        return results.whole()

    def run_with_gradients(
        self, wanted: Sequence[bool], differentiable: Sequence[bool]
    ) -> list[Tensor]:
        """As `run`, then the gradients of the wanted operands for a cotangent of one."""
        results, found = _Results(), Gradients(self.operands, wanted, differentiable)
        for span, piece in self._pieces():
            with naming_row(self.body, piece, span.start):
                results.add(found.chunk(self.body, piece, span, None))
        return [*results.whole(), *found.made()]

    def gradients(
        self, wanted: Sequence[bool], differentiable: Sequence[bool], cotangents: Sequence[Tensor]
    ) -> list[Tensor]:
        """Gradients of the wanted operands for cotangents of the differentiable results."""
        found = Gradients(self.operands, wanted, differentiable)
        for span, piece in self._pieces():
            found.chunk(self.body, piece, span, cotangents)
        return found.made()

    def _pieces(self) -> Iterator[tuple[slice, Operands[Tensor]]]:
        return ((span, part(self.low, span)) for span in self.spans)


class _Results:
    """The results of chunks, put together."""

    def __init__(self) -> None:
        self.rows: list[list[Tensor]] = []
        self.sums: list[Tensor] = []

    def add(self, results: Results) -> None:
        rows, sums = results
        self.rows.append(rows)
        before = self.sums or [torch.zeros_like(s) for s in sums]
        self.sums = [b + s for b, s in zip(before, sums, strict=True)]

    def whole(self) -> list[Tensor]:
        return [*(torch.cat(parts) for parts in zip(*self.rows, strict=True)), *self.sums]


def _run(body: Body, piece: Operands[Tensor]) -> Results:
    return body([*products(piece), *piece.rows, *piece.whole])


@contextmanager
def naming_row(body: Body, piece: Operands[Tensor], first: int) -> Iterator[None]:
    """Errors that one row is to blame for (a class that does not exist) say which row it is."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        row = _blamed(body, piece, error)
        if row is None:
            raise
        kind = IndexError if isinstance(error, IndexError) else RuntimeError
        raise kind(f"row {first + row}: {error}") from error


def _blamed(body: Body, piece: Operands[Tensor], error: Exception) -> int | None:
    """The first row that fails by itself; where all do, only if it is for an index."""
    if isinstance(error, torch.OutOfMemoryError):
        return None
    count = piece.hidden[0].shape[0]
    failed = [_fails(body, part(piece, slice(i, i + 1))) for i in range(count)]
    index = isinstance(error, IndexError) or "out of bounds" in str(error)
    return failed.index(True) if True in failed and (index or not all(failed)) else None


def _fails(body: Body, piece: Operands[Tensor]) -> bool:
    try:
        _run(body, piece)
    except (IndexError, RuntimeError):
        return True
    return False
