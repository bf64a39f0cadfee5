"""How many positions a mask selects: as many of one tensor as of another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.analysis.alike import alike
from graphopt.analysis.axis_rules.sizes import size_of
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Numeric, Profit, Rule

aten = torch.ops.aten


class SelectAlike(Rule):
    """``x[mask]`` and ``y[mask]`` have as many rows: the sizes are known to be one.

    Each selection counts for itself, and a count that values decide equals no other unless told.
    """

    profit = Profit.ALWAYS
    numeric = Numeric.BITWISE

    def find(self, program: Program) -> Iterator[Candidate]:
        known: list[tuple[fx.Node, fx.Node]] = []
        for node in program.graph.find_nodes(op="call_function", target=aten.index.Tensor):
            mask = _mask(node)
            if mask is None:
                continue
            first = next((n for n, other in known if alike(mask, other)), None)
            if first is None:
                known.append((node, mask))
            elif not statically_known_true(_count(node) == _count(first)):
                yield Candidate(Match(program, (node,), (node,), {"first": first}))

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        node, first = match.root, match["first"]
        same, shapes = size_of(_count(first)), build.fake_mode.shape_env
        shapes._set_replacement(size_of(_count(node)), same, "selected by one mask")
        x, indices = node.args
        indices = [None if i is None else _mask(first) for i in indices]
        return build.of_size(list(val(node).shape), node.target, x, indices)

    def examples(self) -> Iterable[Example]:
        yield _case("spelled twice", lambda x: torch.cat([x[x > 0], x.exp()[x > 0]]))

    def near_misses(self) -> Iterable[Example]:
        yield _case("one node", lambda x: (m := x > 0, torch.cat([x[m], x.exp()[m]]))[1])
        yield _case("other masks", lambda x: torch.cat([x[x > 0], x[x > 0.1]]))


def _count(node: fx.Node) -> Any:
    """How many positions a mask selects."""
    given: Any = node.args[1]
    return val(node).shape[next(k for k, index in enumerate(given) if index is not None)]


def _mask(node: fx.Node) -> Any:
    """The mask by which positions are selected."""
    if node.target is not aten.index.Tensor:
        return None
    given: Any = node.args[1]
    indices = [i for i in given if i is not None]
    alone = len(indices) == 1 and val(indices[0]).dtype is torch.bool
    return indices[0] if alone else None


def _case(name: str, function: Any) -> Example:
    return Example(name, lambda: _Function(function), lambda: (torch.randn(9),))


class _Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.function(x)
        return made
