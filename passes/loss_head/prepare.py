"""Other spellings of what the analysis of rows reads: entries by index, diagonals, mixtures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.passes.loss_head.columns import LossOfColumns
from graphopt.passes.loss_head.counts import SelectAlike
from graphopt.passes.loss_head.entries import GatherByArange, ScatterByArange, case
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
            ScatterByArange(),
            GatherDiagonal(),
            LogAddExp(),
            LossOfColumns(),
            SelectAlike(),
            SplitClasses(self.min_bytes),
            select,
        )


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
        yield case("diag", lambda x, _: (x @ x.mT).diag())
        yield case("diagonal", lambda x, _: (x @ x.mT).diagonal() * 2)

    def near_misses(self) -> Iterable[Example]:
        yield case("above", lambda x, _: (x @ x.mT).diagonal(1), "main diagonal")
        yield case("wide", lambda x, _: x.diagonal(), "square")


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
        yield case("mixture", lambda x, _: torch.stack([x, x * 2]).logsumexp(0))
        yield case("shifted", lambda x, _: (torch.stack([x, x * 2]) + 0.5).logsumexp(0))
        yield case("in training", lambda x, _: torch.stack([x, x * 2]).logsumexp(0), train=True)

    def near_misses(self) -> Iterable[Example]:
        shift = torch.randn(2, 1, 1)
        yield case("shifted apart", lambda x, _: (torch.stack([x, x]) + shift).logsumexp(0))
        yield case("kept", lambda x, _: torch.stack([x, x]).logsumexp(0, True), "kept")
        yield case("of three", lambda x, _: torch.stack([x, x, x]).logsumexp(0))
        yield case("other dim", lambda x, _: torch.stack([x, x]).logsumexp(1))


def _adds_number(node: Any) -> bool:
    """Whether a node adds one number to a tensor."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    shift = node.args[1]
    return not isinstance(shift, fx.Node) or val(shift).dim() == 0
