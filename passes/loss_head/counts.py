"""How many positions values select: read where they are selected, not off what follows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from graphopt.analysis.axis_rules.sizes import Size, size_of
from graphopt.analysis.flow import dependents
from graphopt.program import Program, is_random, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Numeric, Profit, Rule
from graphopt.rewrite.match import same_literal

aten = torch.ops.aten


class CountWhereSelected(Rule):
    """``f(x[mask]).shape[0] = x[mask].shape[0]``: a size alone must not need a large value."""

    profit = Profit.ALWAYS
    numeric = Numeric.BITWISE

    def find(self, program: Program) -> Iterator[Candidate]:
        sources = _sources(program)
        below = {source: set(dependents([source])) for source, _ in sources.values()}
        for node in program.graph.find_nodes(op="call_function", target=aten.sym_size.int):
            source, dim = sources.get(size_of(val(node)), (None, 0))
            value: Any = node.args[0]
            if source is not None and value is not source and value in below[source]:
                bound = {"source": source, "dim": dim}
                yield Candidate(Match(program, (node,), (node,), bound))

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        made: fx.Node = build(aten.sym_size.int, match["source"], match["dim"])
        return made

    def examples(self) -> Iterable[Example]:
        yield _case("behind a function", lambda x: x[x > 0].exp())

    def near_misses(self) -> Iterable[Example]:
        yield _case("where it is selected", lambda x: x[x > 0])
        yield _case("of another selection", lambda x: x[x > 0][x[x > 0] > 1].exp()[:0])


def _sources(program: Program) -> dict[Size, tuple[fx.Node, int]]:
    """For each size that values decide, the first tensor that has it, and along which dim."""
    found: dict[Size, tuple[fx.Node, int]] = {}
    for node in program.graph.nodes:
        if isinstance(val(node), Tensor):
            for dim, size in enumerate(val(node).shape):
                if has_free_unbacked_symbols(size):
                    found.setdefault(size_of(size), (node, dim))
    return found


def same_count(one: fx.Node, other: fx.Node, dim: int) -> bool:
    """Whether a dim of two values has as many positions as one mask selects."""
    masks = [_mask(_origin(node, size_of(val(node).shape[dim]))) for node in (one, other)]
    return None not in masks and _alike(*masks)


def _origin(node: fx.Node, size: Size) -> fx.Node:
    """Upwards from a value, the first that has a size which values decide."""
    while True:
        above = (a for a in node.all_input_nodes if isinstance(val(a), Tensor))
        source = next((a for a in above if size in map(size_of, val(a).shape)), None)
        if source is None:
            return node
        node = source


def _mask(node: fx.Node) -> Any:
    """The mask by which positions are selected."""
    if node.target is not aten.index.Tensor:
        return None
    given: Any = node.args[1]
    indices = [i for i in given if i is not None]
    alone = len(indices) == 1 and val(indices[0]).dtype is torch.bool
    return indices[0] if alone else None


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are computed in the same way from the same."""
    if not isinstance(one, fx.Node) or not isinstance(other, fx.Node):
        return same_literal(one, other)
    if one is other:
        return True
    called = one.op == other.op == "call_function" and one.target is other.target
    if not called or is_random(one) or len(one.args) != len(other.args):
        return False
    return one.kwargs == other.kwargs and all(map(_alike, one.args, other.args))


def _case(name: str, function: Any) -> Example:
    return Example(name, lambda: _Counted(function), lambda: (torch.randn(9),))


class _Counted(nn.Module):
    """A mean that is spelled as a sum and a count."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.function(x)
        total: Tensor = made.sum() / max(made.shape[0], 1)
        return total
