"""Sibling projections merged: several linears of one input become one matrix product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Pass, Refusal, Rule, arguments

aten = torch.ops.aten


class MergeSiblings(Rule):
    """``x W1^T, x W2^T, ... = split(x [W1; W2; ...]^T)``: one product reads ``x`` once.

    Query, key and value projections (grouped heads too: the widths may differ) and the gate and up
    projections of a gated MLP. A missing bias counts as zeros where a sibling has one.
    """

    benefit = 2

    def find(self, program: Program) -> Iterator[Candidate]:
        groups: dict[tuple[fx.Node, Any], list[fx.Node]] = {}
        weights = program.weights()
        for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
            weight = arguments(node)["weight"]
            if weight in weights:
                groups.setdefault((node.args[0], val(weight).dtype), []).append(node)
        for siblings in groups.values():
            if len(siblings) > 1:
                nodes = tuple(siblings)
                yield Candidate(Match(program, nodes, nodes, {"x": siblings[0].args[0]}))

    def check(self, match: Match) -> Refusal | None:
        weights = [arguments(n)["weight"] for n in match.nodes]
        if len(set(weights)) < len(weights):
            return Refusal("two of the projections are the same product", match.root)
        refusals = (_weight_refusal(match, node) for node in match.nodes)
        return next(filter(None, refusals), None)

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        build.on_behalf_of(match.roots)
        parts = [arguments(n) for n in match.nodes]
        widths = [val(p["weight"]).shape[0] for p in parts]
        weight = build(aten.cat.default, [p["weight"] for p in parts], 0)
        merged = build(aten.linear.default, match["x"], weight, _bias(parts, build))
        pieces = build(aten.split_with_sizes.default, merged, widths, -1)
        return tuple(build.item(pieces, i) for i in range(len(parts)))

    def examples(self) -> Iterable[Example]:
        yield Example("qkv", lambda: _Siblings(8, 8, 8), _input)
        yield Example("grouped heads", lambda: _Siblings(16, 4, 4), _input)
        yield Example("one bias missing", lambda: _Siblings(8, 8, bias=(True, False)), _input)
        yield Example("no bias", lambda: _Siblings(8, 8, bias=(False, False)), _input)
        yield Example("shared reshape", lambda: _Siblings(8, 4, flat=True), _input)
        shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
        yield Example("dynamic", lambda: _Siblings(8, 8), _input, dynamic_shapes=shapes)
        yield Example("strided input", lambda: _Siblings(8, 8), _strided)
        yield Example("written in place", lambda: _Siblings(8, 8, written=True), _input)
        yield Example("half", lambda: _Siblings(8, 8).bfloat16(), _half)
        yield Example("training", lambda: _Siblings(8, 8, 8), _input, training=True)

    def near_misses(self) -> Iterable[Example]:
        yield Example("tied weights", _Tied, _input, reason="same product")
        yield Example("other inputs", _TwoInputs, _input)
        yield Example("weight read elsewhere", _ReadElsewhere, _input, reason="also used by")
        yield Example("one after the other", _Chained, _input, reason="depends on a value")
        yield Example("returned", _Returned, _input, reason="strides of an output")


def _weight_refusal(match: Match, node: fx.Node) -> Refusal | None:
    given = arguments(node)
    if val(given["weight"]).dim() != 2:
        return Refusal("a weight is not a matrix", node)
    if not match.program.frozen:
        return None
    for weight in (w for w in (given["weight"], given["bias"]) if w is not None):
        if not match.program.is_constant(weight):
            return Refusal(f"`{weight.name}` is not a constant of the model", weight)
        shared = next((u for u in weight.users if u not in match.nodes), None)
        if shared is not None:
            reason = f"`{weight.name}` is also used by `{shared.name}`: a copy would add memory"
            return Refusal(reason, weight)
    return None


def _bias(parts: Sequence[dict[str, Any]], build: Builder) -> fx.Node | None:
    if all(p["bias"] is None for p in parts):
        return None
    rows = [p["bias"] if p["bias"] is not None else build.zeros(p["weight"], 0) for p in parts]
    return build(aten.cat.default, rows, 0)


@dataclass(frozen=True)
class MergeProjections(Pass):
    """Merge linears that read the same input (QKV, gate and up)."""

    def rules(self) -> Sequence[Rule]:
        return (MergeSiblings(),)


class _Siblings(nn.Module):
    def __init__(self, *widths: int, bias: tuple[bool, ...] | None = None, **variant: bool) -> None:
        super().__init__()
        self.variant = variant
        flags = bias or (True,) * len(widths)
        self.parts = nn.ModuleList(nn.Linear(8, w, b) for w, b in zip(widths, flags, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(0, 1) if self.variant.get("flat") else x
        made = [part(x) for part in self.parts]
        if self.variant.get("written"):
            made[0] += 1
        return torch.cat([part.sin() for part in made], -1)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).sin() + self.b(x)


class _TwoInputs(_Tied):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).sin() + self.b(x + 1)


class _ReadElsewhere(_Tied):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).sin() + self.b(x) + self.a.weight.sum()


class _Chained(_ReadElsewhere):
    """The second product's bias comes from the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.b.weight, self.a(x).sum((0, 1)))


class _Returned(_ReadElsewhere):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(x)


def _strided() -> tuple[torch.Tensor, ...]:
    return (torch.randn(6, 4, 8).transpose(0, 1),)


def _half() -> tuple[torch.Tensor, ...]:
    return (torch.randn(4, 6, 8, dtype=torch.bfloat16),)


def _input() -> tuple[torch.Tensor, ...]:
    return (torch.randn(4, 6, 8),)
