"""Entries of a matrix by index, one class of each row: read and written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.program import Program, val
from graphopt.rewrite import (
    Builder,
    Candidate,
    Example,
    Match,
    Numeric,
    Profit,
    Refusal,
    Rule,
    arguments,
)

aten = torch.ops.aten


class _ByArange(Rule):
    """A matrix ``x (n, V)`` at ``[arange(n), t]``, which is one entry of each row.

    Negative entries of ``t`` count from the back.
    """

    profit = Profit.ALWAYS
    numeric = Numeric.BITWISE
    target: Any = None

    def find(self, program: Program) -> Iterator[Candidate]:
        for node in program.graph.find_nodes(op="call_function", target=self.target):
            given = arguments(node)
            x, indices = given["self"], given["indices"]
            if val(x).dim() != 2 or len(indices) != 2 or None in indices:
                continue
            rows, classes = indices
            if rows.target in (aten.arange.default, aten.arange.start):
                bound = {**given, "x": x, "rows": rows, "classes": classes}
                yield Candidate(Match(program, (node,), (node,), bound))

    def check(self, match: Match) -> Refusal | None:
        rows, classes, x = (match.val(k) for k in ("rows", "classes", "x"))
        given = arguments(match["rows"])
        if classes.dim() != 1 or classes.dtype not in (torch.int32, torch.int64):
            return Refusal("the classes are no vector of integers", match["classes"])
        if given.get("start", 0) != 0 or not statically_known_true(rows.shape[0] == x.shape[0]):
            return Refusal("the rows are not all rows in order", match["rows"])
        if not statically_known_true(classes.shape[0] == x.shape[0]):
            return Refusal("there may be fewer classes than rows", match["classes"])
        return None

    def named(self, match: Match, build: Builder) -> fx.Node:
        """The class of each row, ``(n, 1)``, counted from the front."""
        x, classes = match["x"], match["classes"]
        if val(classes).dtype is not torch.int64:
            classes = build(aten._to_copy.default, classes, dtype=torch.int64)
        behind = build(aten.add.Tensor, classes, build.size(x, 1))
        named = build(aten.where.self, build(aten.lt.Scalar, classes, 0), behind, classes)
        made: fx.Node = build(aten.unsqueeze.default, named, 1)
        return made


class GatherByArange(_ByArange):
    """``x[arange(n), t] = gather(x, 1, t)`` for ``x (n, V)``."""

    target = aten.index.Tensor

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        index = self.named(match, build)
        return build(aten.squeeze.dim, build(aten.gather.default, match["x"], 1, index), 1)

    def examples(self) -> Iterable[Example]:
        yield case("labels", lambda x, t: x[torch.arange(5), t])
        yield case("from the back", lambda x, t: x[torch.arange(5), t - 7])
        yield case("int32", lambda x, t: x[torch.arange(5), t.int()])

    def near_misses(self) -> Iterable[Example]:
        yield case("every other row", lambda x, t: x[torch.arange(0, 5, 2), t[:3]])
        yield case("later rows", lambda x, t: x[torch.arange(1, 5), t[1:]], "all rows in order")
        yield case("a mask", lambda x, t: x[torch.arange(5), t[:1]], "fewer classes")


class ScatterByArange(_ByArange):
    """``x[arange(n), t] = v`` as ``scatter(x, 1, t, v)`` for ``x (n, V)``; with ``+= v`` in one
    operator as ``scatter_add``. No entry is written twice."""

    target = aten.index_put.default

    def check(self, match: Match) -> Refusal | None:
        values = match.val("values")
        if values.dim() > 1:
            return Refusal("what is written has further axes", match["values"])
        return super().check(match)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        values, x = match["values"], match["x"]
        column = build(aten.expand.default, values, [build.size(match["classes"], 0)])
        target = aten.scatter_add.default if match["accumulate"] else aten.scatter.src
        index = self.named(match, build)
        return build(target, x, 1, index, build(aten.unsqueeze.default, column, 1))

    def examples(self) -> Iterable[Example]:
        rows = Dim("rows", min=2)
        yield case("margin", _margin)
        yield case("in training", _margin, train=True)
        yield case("dynamic", _margin, dynamic_shapes=({0: rows}, {0: rows}))
        yield case("one number", lambda x, t: _written(x, torch.arange(5), t, torch.tensor(0.5)))
        yield case("from the back", lambda x, t: _written(x, torch.arange(5), t - 7, x[:, 0]))
        yield case("added", lambda x, t: _written(x, torch.arange(5), t, x[:, 0], True))

    def near_misses(self) -> Iterable[Example]:
        twice = torch.tensor([0, 0, 1, 2, 3])
        yield case("rows twice", lambda x, t: _written(x, twice, t, x[:, 0], True))
        yield case("rows in another order", lambda x, t: _written(x, t % 5, t, torch.tensor(0.5)))
        yield case(
            "later rows",
            lambda x, t: _written(x, torch.arange(1, 5), t[1:], x[1:, 0]),
            "all rows in order",
        )
        yield case(
            "one class",
            lambda x, t: _written(x, torch.arange(5), t[:1], x[:, 0]),
            "fewer classes",
        )
        yield case("whole rows", lambda x, _: x.index_put((torch.arange(5),), x * 2))
        yield case("a mask", lambda x, _: x.index_put((x > 0,), torch.tensor(0.5)))


def _margin(x: Tensor, t: Tensor) -> Tensor:
    """Wang et al. 2018, in place."""
    x, rows = x * 2, torch.arange(x.shape[0])
    x[rows, t] -= 0.3
    return x


def _written(
    x: Tensor, rows: Tensor, classes: Tensor, values: Tensor, adds: bool = False
) -> Tensor:
    return x.index_put((rows, classes), values, accumulate=adds)


def case(
    name: str, function: Any, reason: str = "", *, train: bool = False, dynamic_shapes: Any = None
) -> Example:
    """A function of ``x (5, 7)`` and one class for each of its rows."""

    def inputs() -> tuple[Tensor, Tensor]:
        return torch.randn(5, 7), torch.tensor([0, 6, 3, 3, 1])

    return Example(name, lambda: _Function(function), inputs, dynamic_shapes, reason, train)


class _Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        made: Tensor = self.function(x, t)
        return made
