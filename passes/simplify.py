"""Equal computations are done once; what depends on nothing but the model is done beforehand."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from graphopt.analysis.aliases import is_returned, memory_of
from graphopt.analysis.purity import is_pure, is_size
from graphopt.passes.canonicalize.identity import case
from graphopt.passes.fold_constants import FoldCone
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
from graphopt.rewrite.pattern import COMMUTATIVE

aten = torch.ops.aten


class MergeEqual(Rule):
    """``f(x), f(x) = y, y``: two calls of one operator on equal arguments are one.

    Arguments are compared with defaults filled in, operands of sums and products in
    order. Sizes are equal where their expressions are. What draws random numbers, has effects
    or leaves memory undefined stays; so do two returned tensors, which must not become one.
    """

    numeric = Numeric.BITWISE
    profit = Profit.ALWAYS

    def find(self, program: Program) -> Iterator[Candidate]:
        leaders: dict[fx.Node, fx.Node] = {}
        known: dict[Hashable, fx.Node] = {}
        for node in program.graph.nodes:
            if not is_pure(node) and not (node.op == "placeholder" and is_size(val(node))):
                continue
            first = known.setdefault(_key(node, leaders), node)
            if first is not node and node.op != "placeholder":
                leaders[node] = first
                yield Candidate(_equal(program, node, first))

    def check(self, match: Match) -> Refusal | None:
        again, first = match.root, memory_of(match["first"])
        if memory_of(again) is first or not is_returned(again) or not is_returned(first):
            return None
        return Refusal(f"`{first.name}` and this are both returned: they must stay two", again)

    def rewrite(self, match: Match, build: Builder) -> Any:  # noqa: ARG002
        return match["first"]

    def examples(self) -> Iterable[Example]:
        yield case("twice", lambda x: x.sin() + x.sin())
        yield case("chain", lambda x: (x + 1).sin().exp() * (x + 1).sin().exp(), count=3)
        yield case("many", lambda x: sum(x.sin() for _ in range(5)), count=4)
        yield case("either order", lambda x: (x.sin() * x) / (x * x.sin()), count=2)
        yield case("defaults spelled out", lambda x: x.softmax(1) + x.softmax(1, dtype=None))
        yield case("parts of one split", lambda x: x.split(4, 2)[0] + x.split(4, 2)[1])
        yield case("one is returned", lambda x: (x.sin(), x.sin() + 1))
        yield Example("training", lambda: _Norms(False), _rows, training=True)

    def near_misses(self) -> Iterable[Example]:
        yield case("other argument", lambda x: x.softmax(1) + x.softmax(2))
        yield case("int and float", lambda x: x * 2 + x * 2.0, torch.arange(3))
        yield case("signs of zero", lambda x: (x + 0.0) / (x + -0.0), torch.tensor([0.0, -0.0]))
        yield case("other dtype", lambda x: x.double().sin() + x.float().sin())
        yield case("order matters", lambda x: (x - (y := x.sin())) * (y - x))
        yield case("both returned", lambda x: (x + 1, x + 1), reason="must stay two")
        yield case("views returned", lambda x: ((x + 1)[0], (x + 1)[1]), reason="must stay two")
        yield case("written in place", lambda x: x.add(1).add_(1) * x.sub(1).add_(1))
        yield case("random", lambda x: torch.rand_like(x) - torch.rand_like(x))
        yield Example("dropout", lambda: _Norms(True), _rows, training=True)


def _equal(program: Program, node: fx.Node, first: fx.Node) -> Match:
    """Numbers are compared as numbers; tensors as computations, so that gradients meet too."""
    nodes = (node,) if is_size(val(node)) else (node, first)
    return Match(program, (node,), nodes, {"first": first}, frozenset({first}))


def _key(node: fx.Node, leaders: Mapping[fx.Node, fx.Node]) -> Hashable:
    """Equal for equal computations; arguments count as what they were found equal to."""
    value = val(node)
    if is_size(value) and not free_unbacked_symbols(value):
        return type(value), value.node.expr
    if node.op == "placeholder":
        return node
    parts = [_freeze(a, leaders) for a in arguments(node).values()]
    if node.target in COMMUTATIVE and arguments(node).get("alpha", 1) == 1:
        parts[:2] = sorted(parts[:2], key=repr)
    kind = (value.dtype, value.device) if isinstance(value, Tensor) else None
    return node.target, tuple(parts), kind


def _freeze(value: Any, leaders: Mapping[fx.Node, fx.Node]) -> Hashable:
    if isinstance(value, fx.Node):
        return leaders.get(value, value)
    if isinstance(value, list | tuple):
        return tuple(_freeze(v, leaders) for v in value)
    return type(value), repr(value)


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Compute equal values once."""

    def rules(self) -> Sequence[Rule]:
        return (MergeEqual(),)


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute once, beforehand, what does not depend on the inputs, where that adds no memory."""

    def rules(self) -> Sequence[Rule]:
        return (FoldCone(),)


class _Norms(nn.Module):
    """Two layers of one weight on one input, with or without dropout."""

    def __init__(self, dropout: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.p = 0.5 if dropout else 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.p:
            return nn.functional.dropout(x, self.p) + nn.functional.dropout(x, self.p)
        return (x * self.weight).sin() + (x * self.weight).sin().exp()


def _rows() -> tuple[Tensor, ...]:
    return (torch.randn(4, 8),)
