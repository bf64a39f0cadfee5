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
        for node, weight in zip(match.nodes, weights, strict=True):
            if val(weight).dim() != 2:
                return Refusal("a weight is not a matrix", node)
            shared = next((u for u in weight.users if u not in match.nodes), None)
            if match.program.frozen and shared is not None:
                reason = (
                    f"the weight is also used by `{shared.name}`: a merged copy would add memory"
                )
                return Refusal(reason, weight)
        return None

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
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
        yield Example("training", lambda: _Siblings(8, 8, 8), _input, training=True)

    def near_misses(self) -> Iterable[Example]:
        yield Example("tied weights", _Tied, _input, reason="same product")
        yield Example("other inputs", _TwoInputs, _input)


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
    def __init__(self, *widths: int, bias: tuple[bool, ...] | None = None) -> None:
        super().__init__()
        flags = bias or (True,) * len(widths)
        self.parts = nn.ModuleList(nn.Linear(8, w, b) for w, b in zip(widths, flags, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x).sin() for part in self.parts], -1)


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


def _input() -> tuple[torch.Tensor, ...]:
    return (torch.randn(4, 6, 8),)
