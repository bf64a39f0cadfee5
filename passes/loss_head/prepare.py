"""Other spellings of what the analysis of rows reads: entries by index, diagonals, mixtures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.passes.loss_head.columns import LossOfColumns
from graphopt.passes.loss_head.counts import SelectAlike
from graphopt.passes.loss_head.groups import SplitClasses
from graphopt.passes.loss_head.select import SelectFirst
from graphopt.program import Program, val
from graphopt.rewrite import (
    Builder,
    Candidate,
    Example,
    Match,
    Numeric,
    Pass,
    Profit,
    Refusal,
    Rule,
    arguments,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class SpellSummaries(Pass):
    """The spellings that `FuseRowSummaries` reads.

    Attributes:
        min_bytes: products below this size are left alone.
        lazy_logits: logits that the caller gets may be computed when they are read.
    """

    min_bytes: int = 0
    lazy_logits: bool = False

    def rules(self) -> Sequence[Rule]:
        select = SelectFirst(self.min_bytes, lazy_logits=self.lazy_logits)
        return (
            GatherByArange(),
            GatherDiagonal(),
            LogAddExp(),
            LossOfColumns(),
            SelectAlike(),
            SplitClasses(self.min_bytes),
            select,
        )


class GatherByArange(Rule):
    """``x[arange(n), t] = gather(x, 1, t)`` for ``x (n, V)``; negative entries of ``t`` count from
    the back."""

    profit = Profit.ALWAYS
    numeric = Numeric.BITWISE

    def find(self, program: Program) -> Iterator[Candidate]:
        for node in program.graph.find_nodes(op="call_function", target=aten.index.Tensor):
            source, indices = node.args[:2]
            if val(source).dim() == 2 and len(indices) == 2 and None not in indices:
                rows, classes = indices
                if rows.target in (aten.arange.default, aten.arange.start):
                    bound = {"x": source, "rows": rows, "classes": classes}
                    yield Candidate(Match(program, (node,), (node,), bound))

    def check(self, match: Match) -> Refusal | None:
        rows, classes, x = (match.val(k) for k in ("rows", "classes", "x"))
        given = arguments(match["rows"])
        if classes.dim() != 1 or classes.dtype is not torch.int64:
            return Refusal("the classes are no vector of int64", match["classes"])
        if given.get("start", 0) != 0 or not statically_known_true(rows.shape[0] == x.shape[0]):
            return Refusal("the rows are not all rows in order", match["rows"])
        if not statically_known_true(classes.shape[0] == x.shape[0]):
            return Refusal("there may be fewer classes than rows", match["classes"])
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        x, classes = match["x"], match["classes"]
        behind = build(aten.add.Tensor, classes, build.size(x, 1))
        named = build(aten.where.self, build(aten.lt.Scalar, classes, 0), behind, classes)
        index = build(aten.unsqueeze.default, named, 1)
        return build(aten.squeeze.dim, build(aten.gather.default, x, 1, index), 1)

    def examples(self) -> Iterable[Example]:
        yield _case("labels", lambda x, t: x[torch.arange(5), t])
        yield _case("from the back", lambda x, t: x[torch.arange(5), t - 7])

    def near_misses(self) -> Iterable[Example]:
        yield _case("every other row", lambda x, t: x[torch.arange(0, 5, 2), t[:3]])
        yield _case("later rows", lambda x, t: x[torch.arange(1, 5), t[1:]], "all rows in order")


class GatherDiagonal(Rule):
    """``diagonal(x) = gather(x, 1, arange(n))`` for square ``x``."""

    profit = Profit.ALWAYS
    numeric = Numeric.BITWISE

    def find(self, program: Program) -> Iterator[Candidate]:
        for target in (aten.diag.default, aten.diagonal.default):
            for node in program.graph.find_nodes(op="call_function", target=target):
                yield Candidate(Match(program, (node,), (node,), {"x": node.args[0]}))

    def check(self, match: Match) -> Refusal | None:
        given, x = arguments(match.root), match.val("x")
        if x.dim() != 2 or given.get("offset", given.get("diagonal")) != 0:
            return Refusal("it is not the main diagonal of a matrix", match.root)
        if not statically_known_true(x.shape[0] == x.shape[1]):
            return Refusal("the matrix may not be square", match["x"])
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        x = match["x"]
        places = build(aten.arange.default, build.size(x, 0), device=val(x).device)
        index = build(aten.unsqueeze.default, places, 1)
        return build(aten.squeeze.dim, build(aten.gather.default, x, 1, index), 1)

    def examples(self) -> Iterable[Example]:
        yield _case("diag", lambda x, _: (x @ x.mT).diag())
        yield _case("diagonal", lambda x, _: (x @ x.mT).diagonal() * 2)

    def near_misses(self) -> Iterable[Example]:
        yield _case("above", lambda x, _: (x @ x.mT).diagonal(1), "main diagonal")
        yield _case("wide", lambda x, _: x.diagonal(), "square")


class LogAddExp(Rule):
    """``logsumexp(stack([a, b]) + c, 0) = logaddexp(a + c, b + c)``, ``c`` a number or nothing.

    The mixture in a Jensen-Shannon loss is spelled so.
    """

    profit = Profit.ALWAYS

    def find(self, program: Program) -> Iterator[Candidate]:
        for node in program.graph.find_nodes(op="call_function", target=aten.logsumexp.default):
            shifted: Any = node.args[0]
            inner: Any = shifted.args[0] if _adds_number(shifted) else shifted
            given = arguments(node)
            if inner.target is not aten.stack.default or len(inner.args[0]) != 2:
                continue
            if [d % val(inner).dim() for d in given["dim"]] == [arguments(inner)["dim"]]:
                bound = {"pair": inner, "keepdim": given["keepdim"]}
                if shifted is not inner:
                    bound["shift"] = shifted.args[1]
                nodes = tuple(dict.fromkeys((node, shifted, inner)))
                yield Candidate(Match(program, (node,), nodes, bound))

    def check(self, match: Match) -> Refusal | None:
        return Refusal("the dim is kept", match.root) if match["keepdim"] else None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        pair = match["pair"].args[0]
        if "shift" in match:
            pair = [build(aten.add.Tensor, part, match["shift"]) for part in pair]
        return build(aten.logaddexp.default, *pair)

    def examples(self) -> Iterable[Example]:
        yield _case("mixture", lambda x, _: torch.stack([x, x * 2]).logsumexp(0))
        yield _case("shifted", lambda x, _: (torch.stack([x, x * 2]) + 0.5).logsumexp(0))
        yield _case("in training", lambda x, _: torch.stack([x, x * 2]).logsumexp(0), train=True)

    def near_misses(self) -> Iterable[Example]:
        shift = torch.randn(2, 1, 1)
        yield _case("shifted apart", lambda x, _: (torch.stack([x, x]) + shift).logsumexp(0))
        yield _case("kept", lambda x, _: torch.stack([x, x]).logsumexp(0, True), "kept")
        yield _case("of three", lambda x, _: torch.stack([x, x, x]).logsumexp(0))
        yield _case("other dim", lambda x, _: torch.stack([x, x]).logsumexp(1))


def _adds_number(node: Any) -> bool:
    """Whether a node adds one number to a tensor."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    shift = node.args[1]
    return not isinstance(shift, fx.Node) or val(shift).dim() == 0


def _case(name: str, function: Any, reason: str = "", *, train: bool = False) -> Example:
    def inputs() -> tuple[Tensor, Tensor]:
        return torch.randn(5, 7), torch.tensor([0, 6, 3, 3, 1])

    return Example(name, lambda: _Function(function), inputs, reason=reason, training=train)


class _Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        made: Tensor = self.function(x, t)
        return made
