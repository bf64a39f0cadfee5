"""Tensors that are broadcast against each other, each by itself."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.analysis.aliases import is_returned
from graphopt.passes.canonicalize.identity import Identity, case, same_shape
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match

aten = torch.ops.aten


class BroadcastForm(Identity):
    """``broadcast_tensors(x, y)[0] = expand(x, shape)``, or ``x`` where it has that shape."""

    def find(self, program: Program) -> Iterator[Candidate]:
        target = aten.broadcast_tensors.default
        for several in program.graph.find_nodes(op="call_function", target=target):
            for node in several.users:
                if node.target is operator.getitem and not is_returned(node):
                    inner = frozenset([several])
                    yield Candidate(Match(program, (node,), (node, several), {}, inner))

    def rewrite(self, match: Match, build: Builder) -> Any:
        several: Any = match.root.args[0]
        given, wide = several.args[0], val(match.root)
        x = given[match.root.args[1]]
        if same_shape(val(x), wide):
            return x
        return build(aten.expand.default, x, _sizes(given, wide.shape, build))

    def examples(self) -> Iterable[Example]:
        yield case("both", _sum, (4, 1), (1, 3))
        yield case("one", _sum, (4, 3), (3,))
        yield case("dynamic", _sum, (4, 1), (4, 3), dynamic_shapes=(({0: "n"}, {0: "n"}),))
        yield case("one is read", lambda x, y: torch.broadcast_tensors(x, y)[0] + 1, (3,), (4, 1))
        yield case("written", _written, (4, 3), (3,))

    def near_misses(self) -> Iterable[Example]:
        yield case("returned", lambda x, y: torch.broadcast_tensors(x.sin(), y), (4, 3), (3,))
        yield case("a grid", lambda x, y: torch.meshgrid(x, y, indexing="ij")[0] + 1, (3,), (4,))


def _sizes(given: list[fx.Node], shape: torch.Size, build: Builder) -> list[Any]:
    """The common shape, each symbolic size read off a tensor that has it."""
    sizes: list[Any] = []
    for dim, size in enumerate(shape):
        behind = dim - len(shape)
        shapes = {x: val(x).shape for x in given if val(x).dim() >= -behind}
        has = (x for x, s in shapes.items() if statically_known_true(s[behind] == size))
        sizes.append(size if isinstance(size, int) else build.size(next(has), behind))
    return sizes


def _sum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    a, b = torch.broadcast_tensors(x, y)
    return a * 2 + b


def _written(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    a = torch.broadcast_tensors(x.sin(), y)[0]
    return a.add_(1) + a
