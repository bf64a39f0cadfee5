"""The results of pieces, put together."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.body import Results
from graphopt.kernels.chunked_rows.columns import log_added, none_added


class Collected:
    """Values of ``count`` rows, copied in piece by piece, and sums over them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.rows: list[Tensor] | None = None
        self.sums: list[Tensor] | None = None
        self.columns: list[Tensor] = []

    def add(self, results: Results, span: slice) -> None:
        """Take in the results of some rows. None of their memory is kept."""
        rows, sums, matrices = results
        if self.rows is None or self.sums is None:
            self.rows = [r.new_empty((self.count, *r.shape[1:])) for r in rows]
            self.sums = [torch.zeros_like(s) for s in sums]
            self.columns = [none_added(matrix) for matrix in matrices]
        for into, row in zip(self.rows, rows, strict=True):
            into[span] = row
        self.sums = [b + s for b, s in zip(self.sums, sums, strict=True)]
        pairs = zip(self.columns, matrices, strict=True)
        self.columns = [log_added(total, matrix) for total, matrix in pairs]

    def whole(self) -> list[Tensor]:
        return [*(self.rows or ()), *(self.sums or ()), *self.columns]
