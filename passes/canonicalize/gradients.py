"""``detach`` where no gradient flows in the first place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.passes.canonicalize.identity import Identity, case
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match, op
from graphopt.signature import InputKind

aten = torch.ops.aten


class InertDetach(Identity):
    """``detach(x) = x``, where nothing that requires a gradient reaches ``x``.

    Gradients start at floating user inputs and, where the model trains, at parameters.
    """

    pattern = op(aten.detach.default, "x")

    def find(self, program: Program) -> Iterator[Candidate]:
        carrying = carries_gradient(program)
        for candidate in super().find(program):
            if candidate.match is not None and candidate.match["x"] not in carrying:
                yield candidate

    def rewrite(self, match: Match, build: Builder) -> Any:  # noqa: ARG002
        return match["x"]

    def examples(self) -> Iterable[Example]:
        yield Example("buffer", lambda: _Detached("table"), _input)
        yield Example("buffer in training", lambda: _Detached("table"), _input, training=True)
        yield Example("frozen weight", lambda: _Detached("weight"), _input)
        yield case("integers", lambda x: x.cos().detach() * 2, torch.arange(3))

    def near_misses(self) -> Iterable[Example]:
        yield Example("weight in training", lambda: _Detached("weight"), _input, training=True)
        yield case("input", lambda x: x.detach() * x)
        yield case("computed from the input", lambda x: x.sin().detach() * x)


def carries_gradient(program: Program) -> set[fx.Node]:
    """Nodes that a gradient may flow through, for any floating input and any trained parameter."""
    asked = program.differentiable()
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            carries = _may_start(program, node, asked)
        else:
            stops = node.target is aten.detach.default
            carries = not stops and not found.isdisjoint(node.all_input_nodes)
        if carries and _is_differentiable(val(node)):
            found.add(node)
    return found


def _may_start(program: Program, node: fx.Node, asked: Collection[str]) -> bool:
    """A parameter that is fixed today may be trained tomorrow; what Dynamo passes in is guarded."""
    kind = program.inputs[node.name].kind
    if kind is InputKind.USER:
        fake = val(node)
        return node.name in asked or (isinstance(fake, Tensor) and fake.dtype.is_complex)
    return kind is InputKind.PARAMETER and not program.frozen


def _is_differentiable(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_differentiable(v) for v in value)
    tensor = isinstance(value, Tensor)
    return tensor and (value.dtype.is_floating_point or value.dtype.is_complex)


class _Detached(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.register_buffer("table", torch.randn(8))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        chosen: Tensor = getattr(self, self.name)
        return x * chosen.detach() + self.weight


def _input() -> tuple[Tensor, ...]:
    return (torch.randn(4, 8),)
