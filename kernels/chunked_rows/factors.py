"""Gradients of the two factors of a product, from its slopes.

Of ``P = h w^T``: to ``h`` goes ``slope w``, to ``w`` goes ``slope^T h``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

_CLASSES = 4096
"""Classes of a partial gradient that waits to be added to a wider sum."""


class Rows(NamedTuple):
    """Some rows of a product.

    Attributes:
        span: which of all rows.
        slope: ``(n, V)``.
        hidden: ``(n, D)``.
        weight: ``(V, D)``, of all rows.
    """

    span: slice
    slope: Tensor
    hidden: Tensor
    weight: Tensor

    def part(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop`` of these."""
        first = self.span.start
        span, some = slice(first + start, first + stop), slice(start, stop)
        return Rows(span, self.slope[some], self.hidden[some], self.weight)


class FactorGradients:
    """What is filled chunk by chunk.

    Args:
        hidden: ``(N, D)``; ``None`` where nobody asked for it.
        weight: ``(V, D)``, a sum over chunks; ``None`` likewise.
    """

    def __init__(self, hidden: Tensor | None, weight: Tensor | None) -> None:
        self.hidden, self.weight = hidden, weight
        self.is_fresh = True

    @property
    def is_wanted(self) -> bool:
        return self.hidden is not None or self.weight is not None

    def piece(self, rows: Rows) -> None:
        """Look at slopes that were made just now, and are in a cache; `chunk` comes later."""

    def chunk(self, rows: Rows) -> None:
        """Take all rows of a chunk in, whose pieces were given in order."""
        self._all_classes(rows)

    def finish(self) -> None:
        """After the last chunk."""

    def _all_classes(self, rows: Rows) -> None:
        if self.hidden is not None:
            self.hidden[rows.span] = rows.slope @ rows.weight
        if self.weight is not None:
            add_product(self.weight, rows.slope, rows.hidden, first=self.is_fresh)
            self.is_fresh = False


def add_product(into: Tensor, slope: Tensor, hidden: Tensor, *, first: bool) -> None:
    """``into += slope^T hidden``, or ``=``; where ``into`` is wider, a few classes at a time."""
    if into.dtype == slope.dtype:
        into.addmm_(slope.mT, hidden, beta=0 if first else 1)
        return
    for start in range(0, into.shape[0], _CLASSES):
        classes = slice(start, start + _CLASSES)
        product = slope[:, classes].mT @ hidden
        if first:
            into[classes] = product
        else:
            into[classes].add_(product)
