"""What depends on nothing but the model is computed once, where that adds no memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from graphopt.analysis.aliases import is_returned, is_view
from graphopt.analysis.flow import ancestors
from graphopt.analysis.purity import is_pure
from graphopt.passes.canonicalize.identity import case
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
)
from graphopt.rewrite.subgraph import extract
from graphopt.signature import InputKind

aten = torch.ops.aten

ALLOWANCE = 4096
"""Bytes by which one fold may add to the model: a row of positions, a small mask."""

_LITERALS = frozenset(
    {
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.full.default,
        aten.ones.default,
        aten.scalar_tensor.default,
        aten.zeros.default,
    }
)
"""Folding one of these alone would only hide its value from patterns."""

_PARAMETRIZED = (
    re.compile(r"(?:^|(?<=\.))parametrizations\.(\w+)\.original\d*$"),
    re.compile(r"(\w+)_(?:orig|g|v)$"),
)


class FoldCone(Rule):
    """``f(weights) = constant``: a maximal cone of operators on constants becomes one tensor.

    Weight and spectral normalisation in evaluation, rotary tables and masks of fixed size. The cone
    is computed by its own operators in its own dtypes, so every bit stays. Where the result would
    hold more bytes than it frees, plus `ALLOWANCE`, the cone is cut below the operator that grows.
    """

    numeric = Numeric.BITWISE
    profit = Profit.ALWAYS

    def find(self, program: Program) -> Iterator[Candidate]:
        yield from (Candidate(match) for match in Cones(program).decide())

    def check(self, match: Match) -> Refusal | None:
        return _refusal(match)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        piece = extract(match.program, [match.root], set(match.nodes))
        with torch.no_grad():
            (value,) = piece.module(*map(match.program.tensor, piece.sources))
        name = _name(match.root, piece.state, match.program)
        return build.state(name, value.clone(), piece.sources)

    def examples(self) -> Iterable[Example]:
        yield _wrapped("weight norm", lambda: parametrizations.weight_norm(nn.Linear(8, 8)))
        yield _wrapped("spectral norm", lambda: parametrizations.spectral_norm(nn.Linear(8, 8)))
        yield _wrapped("weight norm by hook", lambda: nn.utils.weight_norm(nn.Linear(8, 8)))
        yield _wrapped("spectral norm by hook", lambda: nn.utils.spectral_norm(nn.Linear(8, 8)))
        yield case("positions", lambda x: x * (torch.arange(8) * 0.5).cos())
        yield case("mask", lambda x: x + torch.ones(6, 8).tril().log())
        yield case(
            "below what grows", lambda x: (x, torch.arange(99).sin().expand(99, -1) @ x), (99, 8)
        )
        yield case("literals in training", lambda x: x * torch.arange(8).cos(), training=True)

    def near_misses(self) -> Iterable[Example]:
        yield case("grows", lambda x: x @ torch.ones(64, 64).tril(), (4, 64), reason="16384 bytes")
        yield _wrapped("shared", lambda: _Shared(), reason="frees 0")
        yield _wrapped("weights in training", lambda: _Scaled(), training=True)
        yield _wrapped("a view only", lambda: _Viewed())
        yield case("random", lambda x: x + torch.rand(8))
        yield case("returned", lambda x: (x, torch.arange(8).cos()), reason="is returned")
        yield case("input", lambda x: x.cos() * x.new_ones(()))


def _refusal(match: Match) -> Refusal | None:
    if is_returned(match.root):
        reason = "the constant is returned: the caller could write into the model's own"
        return Refusal(reason, match.root)
    made, freed = match["bytes"], match["freed"]
    if made <= freed + ALLOWANCE:
        return None
    return Refusal(f"the result would hold {made} bytes and frees {freed}", match.root)


class Cones:
    """Constant nodes of a program, and which of them are worth replacing by their value.

    ``position`` holds constant state and the operators on nothing else, in graph order; ``working``
    those that do more than view or fill.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.position: dict[fx.Node, int] = {}
        self.working: set[fx.Node] = set()
        for position, node in enumerate(program.graph.nodes):
            if program.is_constant(node) or self._is_constant(node):
                self.position[node] = position

    def _is_constant(self, node: fx.Node) -> bool:
        inputs = node.all_input_nodes
        if not is_pure(node) or not _is_static(val(node)):
            return False
        if any(n not in self.position for n in inputs):
            return False
        computes = not is_view(node) and node.target not in _LITERALS
        if computes or not self.working.isdisjoint(inputs):
            self.working.add(node)
        return True

    def decide(self) -> Iterator[Match]:
        """Candidates from the outputs back; where one is refused, its arguments are tried."""
        kept: set[fx.Node] = set()
        dead: set[fx.Node] = set()
        for node in reversed(self.position):
            if all(u in self.position and u not in kept for u in node.users):
                continue
            if node not in self.working or not isinstance(val(node), Tensor):
                kept.add(node)
                continue
            match, freed = self._cone(node, dead)
            yield match
            if _refusal(match) is None:
                dead |= freed
            else:
                kept.add(node)

    def _cone(self, root: fx.Node, dead: set[fx.Node]) -> tuple[Match, set[fx.Node]]:
        """The match of everything behind ``root``, and what has no users left once it is folded."""
        cone = sorted(ancestors([root]), key=self.position.__getitem__, reverse=True)
        freed = {root}
        for node in cone[1:]:
            if all(user in freed or user in dead for user in node.users):
                freed.add(node)
        state = [val(n) for n in freed if n.op == "placeholder"]
        sizes = {"bytes": _bytes(val(root)), "freed": sum(map(_bytes, state))}
        nodes = tuple(n for n in cone if n.op != "placeholder")
        inside = set(nodes)
        shared = frozenset(n for n in nodes[1:] if not inside.issuperset(n.users))
        return Match(self.program, (root,), nodes, sizes, shared), freed


def _is_static(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_static, value))
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    return not value.is_quantized and all(isinstance(n, int) for n in value.shape)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _name(root: fx.Node, state: Mapping[str, Tensor], program: Program) -> str:
    """After the largest tensor in the cone, a parameter if there is one: ``conv.weight_folded``."""
    if not state:
        return f"{root.name}_folded"
    entries = [program.inputs[name] for name in state]
    owned = [e for e in entries if e.kind is InputKind.PARAMETER] or entries
    name = max(owned, key=lambda e: _bytes(state[e.name])).target or root.name
    name = name.removesuffix("_folded")
    for pattern in _PARAMETRIZED:
        name = pattern.sub(r"\1", name)
    return f"{name}_folded"


def _wrapped(name: str, make: Callable[[], nn.Module], **options: Any) -> Example:
    """An example around one module on rows of 8."""
    return Example(name, make, lambda: (torch.randn(3, 8),), **options)


class _Scaled(nn.Module):
    """A layer whose weight is scaled at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 0.5)


class _Shared(_Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, 8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.weight


class _Viewed(_Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()
