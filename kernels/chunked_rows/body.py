"""Straight-line programs over matrices of rows, as text that travels inside an operator's call.

A body is what stands between a large product and its row summaries. It is spelled in Python, one
operator a line, and read by a parser that knows nothing else::

    def body(logits, target):
        a = aten.cross_entropy_loss.default(logits, target, None, 0)
        b = aten.sum.default(a)
        return [a], [b]

The first list holds values per row, ``(n, ...)``; the second sums over rows, without axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor

from graphopt.kernels.chunked_rows.fusing import fused
from graphopt.kernels.chunked_rows.parsing import Parsed, filled, names, parse

Results = tuple[list[Tensor], list[Tensor]]


class Body:
    """A parsed body.

    Attributes:
        parameters: names, in order.
        rows, sums: names of the results.
    """

    def __init__(self, parsed: Parsed) -> None:
        self._parsed = parsed
        self.parameters, self.rows, self.sums = parsed.parameters, parsed.rows, parsed.sums
        self._steps = list(zip(parsed.steps, _deaths(parsed), strict=True))

    @cached_property
    def fused(self) -> Body:
        """The same body for products that are its own to write over, see `fusing`.

        Its gradients have none themselves.
        """
        return Body(fused(self._parsed))

    def __call__(self, tensors: list[Tensor]) -> Results:
        """Values per row, and sums.

        Args:
            tensors: one per parameter, each with ``n`` rows or whole. The list is emptied, so that
                a large matrix can be freed after the step that reads it last.

        Raises:
            ValueError: a result does not have ``n`` rows, or a sum has axes.
        """
        count = tensors[0].shape[0]
        values: dict[str, Any] = dict(zip(self.parameters, tensors, strict=True))
        tensors.clear()
        for step, dead in self._steps:
            args, kwargs = filled((step.args, step.kwargs), values)
            values[step.name] = step.target(*args, **kwargs)
            for name in dead:
                del values[name]
        rows, sums = ([values[n] for n in names] for names in (self.rows, self.sums))
        self._check(rows, sums, count)
        return rows, sums

    def _check(self, rows: Sequence[Tensor], sums: Sequence[Tensor], count: int) -> None:
        for name, row in zip(self.rows, rows, strict=True):
            if row.dim() == 0 or row.shape[0] != count:
                raise ValueError(f"`{name}` is {tuple(row.shape)} for {count} rows")
        for name, total in zip(self.sums, sums, strict=True):
            if total.dim():
                raise ValueError(f"`{name}` is {tuple(total.shape)}, where a sum has no axes")


@lru_cache(maxsize=512)
def read(text: str) -> Body:
    """The body that a text spells.

    Raises:
        ValueError: the text is no body; says what is no part of one.
    """
    return Body(parse(text))


def _deaths(parsed: Parsed) -> list[list[str]]:
    """For each step the values that nothing reads after it."""
    alive = {*parsed.rows, *parsed.sums}
    found: list[list[str]] = []
    for step in reversed(parsed.steps):
        here = dict.fromkeys([*names(step), step.name])
        found.append([name for name in here if name not in alive])
        alive.update(here)
    return found[::-1]
