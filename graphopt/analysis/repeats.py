"""Shifts: partial maps that carry the nodes of a graph to equal nodes one period earlier.

A program with repeated layers maps onto itself, one layer back. Two nodes that compute the same
function are walked backwards together, argument by argument; as FX arguments are ordered, there is
never a choice, so the walk is linear where a general subgraph isomorphism search could explode.
Start pairs come from Weisfeiler-Lehman labels (Shervashidze et al. 2011, section 2), refined over
producers with their argument positions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from graphopt.analysis.flow import leaves

ROUNDS = (1, 3)
"""Label depths at which start pairs are looked for."""
NEAREST = 2
"""How many earlier nodes of equal label are tried as the one a period before."""

Pair: TypeAlias = tuple[Node, Node]
"""A later and an earlier node."""

_HOLE = "<node>"
_UNBACKED = re.compile(r"\bu\d+\b")


class Index:
    """What the search reads of each node: its place, its label and the producers it reads."""

    def __init__(self, graph: Graph) -> None:
        self.place = {node: i for i, node in enumerate(graph.nodes)}
        self.calls = {node for node in graph.nodes if is_call(node)}
        self.reads = {n: [a for a in leaves(n) if isinstance(a, Node)] for n in graph.nodes}
        number: dict[Any, int] = {}
        self.label = {n: number.setdefault(_own_label(n), len(number)) for n in graph.nodes}

    def refined(self, rounds: int) -> dict[Node, int]:
        """Labels equal where the cones of producers agree ``rounds`` steps back."""
        label = self.label
        for _ in range(rounds):
            number: dict[Any, int] = {}
            label = {
                n: number.setdefault((label[n], *(label[p] for p in self.reads[n])), len(number))
                for n in self.place
            }
        return label

    def seeds(self) -> list[Pair]:
        """Pairs (later, earlier) of calls with equal refined labels, the latest first."""
        found: dict[Pair, None] = {}
        for rounds in ROUNDS:
            label, members = self.refined(rounds), defaultdict[int, list[Node]](list)
            for node in self.place:
                if node in self.calls:
                    before = members[label[node]]
                    found.update(((node, other), None) for other in before[-NEAREST:])
                    before.append(node)
        return sorted(found, key=lambda pair: (-self.place[pair[0]], -self.place[pair[1]]))


class Shift:
    """A one-to-one map from later nodes to earlier ones of equal label."""

    def __init__(self, index: Index, allowed: set[Node] | None = None) -> None:
        self.index, self.allowed = index, index.calls if allowed is None else allowed
        self.back: dict[Node, Node] = {}
        self.fore: dict[Node, Node] = {}

    def descend(self, pair: Pair, seen: set[Pair]) -> list[Pair]:
        """Map the later of ``pair`` to the earlier, their producers likewise, while they are equal.

        Pairs in ``seen`` belong to another walk and are left out. Returns and adds what is mapped.
        """
        stack, made = [pair], []
        while stack:
            later, earlier = stack.pop()
            if (later, earlier) in seen or not self._fits(later, earlier):
                continue
            self.back[later], self.fore[earlier] = earlier, later
            made.append((later, earlier))
            stack.extend(zip(self.index.reads[later], self.index.reads[earlier], strict=True))
        seen.update(made)
        return made

    def _fits(self, later: Node, earlier: Node) -> bool:
        label = self.index.label
        free = later not in self.back and earlier not in self.fore
        inside = not is_call(later) or {earlier, later} <= self.allowed
        return free and inside and later is not earlier and label[later] == label[earlier]

    def ascend(self) -> None:
        """Map users of mapped nodes too: results that no mapped node reads, such as a cache."""
        work = list(self.back.items())
        for later, earlier in work:
            for user in sorted(later.users):
                alike = (u for u in sorted(earlier.users) if self._alike(user, u))
                if user not in self.back and (match := next(alike, None)) is not None:
                    work.extend(self.descend((user, match), set()))

    def _alike(self, later: Node, earlier: Node) -> bool:
        return is_call(later) and self._fits(later, earlier) and self._reads_alike(later, earlier)

    def _reads_alike(self, later: Node, earlier: Node) -> bool:
        pairs = zip(self.index.reads[later], self.index.reads[earlier], strict=True)
        return all(
            a is b or self.back.get(a) is b or (a not in self.back and b not in self.fore)
            for a, b in pairs
        )

    def within(self, allowed: set[Node]) -> Shift:
        """This map on the calls in ``allowed``, and on everything that is no call."""
        kept = Shift(self.index, allowed)
        for later, earlier in self.back.items():
            if not is_call(later) or {later, earlier} <= allowed:
                kept.back[later], kept.fore[earlier] = earlier, later
        return kept

    def __len__(self) -> int:
        return sum(map(is_call, self.back))

    def orbits(self) -> list[list[Node]]:
        """The calls that the map carries into each other, earliest first, in program order."""
        starts = (n for n in self.fore if n not in self.back and is_call(n))
        return [self._orbit(n) for n in sorted(starts)]

    def _orbit(self, node: Node) -> list[Node]:
        found = [node]
        while found[-1] in self.fore:
            found.append(self.fore[found[-1]])
        return found


def shifts(index: Index) -> list[Shift]:
    """All maps that the seeds give, no pair in two of them."""
    seen: set[Pair] = set()
    found = []
    for seed in index.seeds():
        if seed not in seen:
            shift = Shift(index)
            shift.descend(seed, seen)
            found.append(shift)
    return found


def is_call(node: Node) -> bool:
    """Whether the node computes something, rather than being an input, attribute or output."""
    return node.op.startswith("call_")


def _own_label(node: Node) -> Any:
    """What the node computes, its literals and the shapes and dtypes of its results."""
    arguments = (node.args, tuple(sorted(node.kwargs.items())))
    literals = map_aggregate(arguments, lambda leaf: _HOLE if isinstance(leaf, Node) else leaf)
    named = None if node.op == "placeholder" else (node.target, repr(literals))
    return node.op, named, _value(node.meta.get("val"))


def _value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device.type, tuple(map(_size, value.shape))
    if isinstance(value, tuple | list):
        return tuple(map(_value, value))
    return _size(value) if isinstance(value, torch.SymInt) else type(value)


def _size(size: int | torch.SymInt) -> int | str:
    """A size; those that depend on data are all alike, as every layer has symbols of its own."""
    return _UNBACKED.sub("u", str(size)) if isinstance(size, torch.SymInt) else size
