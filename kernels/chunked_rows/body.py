"""Straight-line programs over matrices of rows, as text that travels inside an operator's call.

A body is what stands between a large product and its row summaries. It is spelled in Python, one
operator a line, and read by a parser that knows nothing else::

    def body(logits, target):
        a = aten.cross_entropy_loss.default(logits, target, None, 0)
        b = aten.sum.default(a)
        return [a], [b]

The first list holds values per row, ``(n, ...)``; the second sums over rows, without axes. A third
list, where there is one, holds matrices ``(n, V)`` whose columns are summed up over all rows as
``log sum exp``.
"""

from __future__ import annotations

from collections.abc import Set
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from graphopt.kernels.chunked_rows.fusing import fused
from graphopt.kernels.chunked_rows.parsing import Parsed, filled, names, parse
from graphopt.kernels.chunked_rows.swept import swept, wide


class Results(NamedTuple):
    """What a body gives for ``n`` rows: ``(n, ...)`` each; numbers; matrices ``(n, V)``."""

    rows: list[Tensor]
    sums: list[Tensor]
    columns: list[Tensor]


class Body:
    """A parsed body.

    Attributes:
        parameters: names, in order.
        rows, sums, columns: names of the results.
    """

    def __init__(self, parsed: Parsed) -> None:
        self._parsed, self.parameters = parsed, parsed.parameters
        self.rows, self.sums, self.columns = parsed.rows, parsed.sums, parsed.columns
        self._steps = list(zip(parsed.steps, _deaths(parsed), strict=True))

    @cached_property
    def fused(self) -> Body:
        """The same body for products that are its own to write over, see `fusing`.

        Its gradients have none themselves.
        """
        return Body(fused(self._parsed))

    @cached_property
    def swept(self) -> tuple[Body, Set[str]] | None:
        """The same body on a `Product` that is not held, and its `wide` parameters.

        ``None`` where it needs more of the product than one sweep gives.
        """
        found = swept(self._parsed)
        return None if found is None else (Body(found), wide(found))

    def __call__(self, tensors: list[Any]) -> Results:
        """Values per row, sums, and matrices of columns.

        Args:
            tensors: one per parameter, each with ``n`` rows or whole; the first of a swept body is
                a `Product`. The list is emptied, so that a large matrix can be freed after the
                step that reads it last.

        Raises:
            ValueError: a result does not have ``n`` rows, a sum has axes, or a matrix not two.
        """
        count = tensors[0].shape[0]
        values: dict[str, Any] = dict(zip(self.parameters, tensors, strict=True))
        tensors.clear()
        for step, dead in self._steps:
            args, kwargs = filled((step.args, step.kwargs), values)
            values[step.name] = step.target(*args, **kwargs)
            for name in dead:
                del values[name]
        listed = (self.rows, self.sums, self.columns)
        results = Results(*([values[n] for n in names] for names in listed))
        self._check(results, count)
        return results

    def _check(self, results: Results, count: int) -> None:
        for name, row in zip(self.rows, results.rows, strict=True):
            if row.dim() == 0 or row.shape[0] != count:
                raise ValueError(f"`{name}` is {tuple(row.shape)} for {count} rows")
        for name, total in zip(self.sums, results.sums, strict=True):
            if total.dim():
                raise ValueError(f"`{name}` is {tuple(total.shape)}, where a sum has no axes")
        for name, matrix in zip(self.columns, results.columns, strict=True):
            if matrix.dim() != 2 or matrix.shape[0] != count:
                raise ValueError(f"`{name}` is {tuple(matrix.shape)}, no matrix of {count} rows")


@lru_cache(maxsize=512)
def read(text: str) -> Body:
    """The body that a text spells.

    Raises:
        ValueError: the text is no body; says what is no part of one.
    """
    return Body(parse(text))


def _deaths(parsed: Parsed) -> list[list[str]]:
    """For each step the values that nothing reads after it."""
    alive: set[str] = {*parsed.results}
    found: list[list[str]] = []
    for step in reversed(parsed.steps):
        here = dict.fromkeys([*names(step), step.name])
        found.append([name for name in here if name not in alive])
        alive.update(here)
    return found[::-1]
