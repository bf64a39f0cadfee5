"""How rows are cut: into chunks for the products, and those into pieces for the body.

Products want many rows: each chunk reads the weight twice and the sum of its gradients once, and
writes that. A body wants few: what it computes beside the product, in float32, is several times
the size of its piece, and is soon read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.operands import Operands, all_classes, of_body, part, split

_LEAST = 16 * 2**20
"""Bytes of the products of a chunk that are worth a chunk."""

_MOST = 48 * 2**20
"""Bytes of the products of a chunk, where nothing else is asked for, on a CPU."""

_ENOUGH = 512
"""Rows of a chunk that are enough for its products: 16 bytes of the weight and of the sum of its
gradients for ``6 * 512`` operations. Measured on 2 cores, D = 512, V = 32000, float32, all three
products: 1.21x the time at 128 rows, 1.17x at 256, 0.95x at 1024; in bfloat16 1.27x at 128."""

_FEWEST = 128
"""Rows of a chunk at least, however large it gets."""

_ELSEWHERE = 256 * 2**20
"""Bytes of the products of a chunk on other devices, which smaller products leave idle."""

PIECE = 2**21
"""Numbers of the products of a piece: 8 MiB in float32, which stay in a cache."""


@dataclass(frozen=True)
class Piece:
    """Some rows of a chunk.

    Attributes:
        span: which of all rows of hidden.
        operands: their rows.
        products: theirs, views of those of the chunk.
    """

    span: slice
    operands: Operands[Tensor]
    products: list[Tensor]

    @property
    def body_span(self) -> slice:
        """Which of all rows of a body."""
        return of_body(self.span, self.operands.groups)

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters of a body."""
        return [*self.matrices, *self.operands.rows, *self.operands.whole]

    @property
    def matrices(self) -> list[Tensor]:
        """The products as a body reads them, in the same memory."""
        return [split(p, w) for p, w in zip(self.products, self.operands.weight, strict=True)]


class Chunk:
    """The products of some rows, in memory that later chunks use again.

    Attributes:
        span: which of all rows of hidden.
        operands: their rows.
        products: ``(n, G * V_i)`` each; once a body has been differentiated, its slopes.
    """

    def __init__(self, operands: Operands[Tensor], span: slice, rooms: Iterable[Tensor]) -> None:
        self.span, self.operands = span, part(operands, span)
        trios = zip(self.operands.hidden, operands.weight, rooms, strict=True)
        self.products = [torch.mm(h, all_classes(w).mT, out=room[: len(h)]) for h, w, room in trios]

    def pieces(self) -> Iterator[Piece]:
        width = sum(p.shape[1] for p in self.products)
        on_cpu = self.products[0].device.type == "cpu"
        count = self.span.stop - self.span.start
        for span in _even(count, PIECE // max(1, width) if on_cpu else count):
            start, stop = self.span.start + span.start, self.span.start + span.stop
            products = [p[span] for p in self.products]
            yield Piece(slice(start, stop), part(self.operands, span), products)


def spans(operands: Operands[Tensor], chunk_bytes: int) -> Iterator[slice]:
    """Chunks as even as they can be, of one row at least; one empty chunk where there are no rows.

    Args:
        chunk_bytes: of all products of a chunk together; 0 for the device's default.
    """
    row_bytes = sum(all_classes(w).shape[0] * w.element_size() for w in operands.weight)
    hidden = operands.hidden[0]
    return _even(hidden.shape[0], rows_of_chunk(row_bytes, hidden.device, chunk_bytes))


def rows_of_chunk(row_bytes: int, device: torch.device, chunk_bytes: int) -> int:
    """Rows of hidden that are taken at a time, at most; one where a row is more than a chunk.

    Args:
        row_bytes: of all products of a row together.
        chunk_bytes: of all products of a chunk together; 0 for the device's default.
    """
    row_bytes = max(1, row_bytes)
    if chunk_bytes:
        return max(1, chunk_bytes // row_bytes)
    default = _default(row_bytes) if device.type == "cpu" else _ELSEWHERE // row_bytes
    return max(_FEWEST, default)


def _default(row_bytes: int) -> int:
    return min(_MOST // row_bytes, max(_ENOUGH, _LEAST // row_bytes))


def _even(count: int, most: int) -> Iterator[slice]:
    """Spans of ``most`` rows at most, where that is one or more."""
    parts = max(1, -(-count // max(1, most)))
    step = max(1, -(-count // parts))
    for start in range(0, max(1, count), step):
        yield slice(start, min(start + step, count))
