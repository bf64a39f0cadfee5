"""Where an axis lives in every later tensor, and which operations mix along it.

Choose an axis of a tensor and follow it through a graph of functional ATen operators::

    flow = trace_axis(logits, 1)    # the class axis of logits[rows, classes]
    flow.placement(node)            # where it lives, as long as slices are independent
    flow.mixes                      # softmax, reductions, ...: what combines its indices
    flow.unknown                    # where the analysis stopped, and why

The guarantee, for every tensor with a `placement`: a position depends on the chosen axis only at
its own index (see `Placement`), all other inputs being equal. An operator without a rule is
*unknown*, and what depends on it is not analysed. The rules are in `graphopt.analysis.axis_rules`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from graphopt.analysis.axis_rules import RULES, pointwise, rule
from graphopt.analysis.axis_rules.call import (
    Aligned,
    Call,
    Carry,
    Mix,
    Outcome,
    Parallel,
    Rule,
    Shapes,
    State,
    Unknown,
    is_tensor,
    name_of,
)
from graphopt.analysis.axis_rules.fold import seed
from graphopt.analysis.axis_rules.placement import Leg, Placement
from graphopt.analysis.axis_rules.provenance import source_line
from graphopt.analysis.axis_rules.sizes import Size, Untrackable
from graphopt.analysis.axis_rules.slicing import bind_sizes, index_map, slice_along
from graphopt.errors import GraphoptError

__all__ = [
    "Aligned", "AxisFlow", "Carry", "Leg", "Mix", "Parallel", "Placement", "Unknown", "bind_sizes",
    "index_map", "rule", "rule_of", "slice_along", "source_line", "trace_axis",
]  # fmt: skip

Verdict = Parallel | Mix | Unknown
MIXED = Carry((), pure=False)


@dataclass(frozen=True)
class AxisFlow:
    """One axis through a graph.

    Attributes:
        extent: the size of the axis.
        states: per node what its tensor has of the axis; per output for a node of several. Nodes
            that do not depend on the axis, or only through an unknown operation, are absent.
        verdicts: per operation on the axis whether it is parallel, mixes, or is unknown.
        aligned: per operation, operands that do not carry the axis but are indexed by it.
        stopped: nodes that depend on an unknown operation.
    """

    extent: Size
    states: Mapping[Node, State | tuple[State, ...]]
    verdicts: Mapping[Node, Verdict]
    aligned: Mapping[Node, tuple[Aligned, ...]]
    stopped: frozenset[Node]

    def placement(self, node: Node) -> Placement | None:
        """Where the axis lives in a tensor whose slices along it are independent."""
        state = self.states.get(node)
        return state.places[0] if isinstance(state, Carry) and state.pure else None

    def places(self, node: Node) -> tuple[Placement, ...]:
        """Where the axis lives, also after something mixed along it (softmax, attention)."""
        state = self.states.get(node)
        return state.places if isinstance(state, Carry) else ()

    def depends(self, node: Node) -> bool:
        """Whether a node may depend on the axis."""
        return node in self.states or node in self.stopped

    @cached_property
    def mixes(self) -> dict[Node, Mix]:
        return {node: v for node, v in self.verdicts.items() if isinstance(v, Mix)}

    @cached_property
    def unknown(self) -> dict[Node, Unknown]:
        return {node: v for node, v in self.verdicts.items() if isinstance(v, Unknown)}

    @cached_property
    def parallel(self) -> dict[Node, Parallel]:
        return {node: v for node, v in self.verdicts.items() if isinstance(v, Parallel)}

    @cached_property
    def ends(self) -> dict[Node, Mix]:
        """The operations after which no dim is left that the axis indexes."""
        return {node: mix for node, mix in self.mixes.items() if not _lives(self.states[node])}


def _lives(state: State | tuple[State, ...]) -> bool:
    states = state if isinstance(state, tuple) else (state,)
    return any(one is not None and one.places for one in states)


def trace_axis(
    node: Node,
    dims: int | Sequence[int],
    also: Mapping[Node, int | Sequence[int] | Placement] | None = None,
) -> AxisFlow:
    """Follow an axis from a tensor to the end of its graph, in time linear in the graph's size.

    Args:
        node: the tensor; it and all later nodes need ``meta["val"]``.
        dims: the dim that is the axis, or several that form it in row-major order (``(0, 1)`` of
            ``(B, S, V)`` are the rows).
        also: other tensors that carry the same axis, with its dims or placement there (labels
            beside hidden states). What they are computed from is not asked.

    Raises:
        GraphoptError: a seed is no tensor, has no such dim, or an extent of its own, or of one.
    """
    seeds = {node: dims, **(also or {})}
    placed = {other: _seed(other, where) for other, where in seeds.items()}
    extent = placed[node][1]
    for other, (_, size) in placed.items():
        if size not in (extent, None):
            raise GraphoptError(
                f"the axis has {extent} indices in {node} and {size} in {other}",
                where=source_line(other),
                fix="give dims of one size (dynamic ones by one torch.export.Dim) or a placement",
            )
    if extent == 1:
        raise GraphoptError(
            f"dim {dims} of {node} has one index: there is nothing to follow",
            where=source_line(node),
            fix="capture with a size of at least 2 along this axis",
        )
    tracer = _Tracer({other: Carry((place,), pure=True) for other, (place, _) in placed.items()})
    for later in node.graph.nodes:
        tracer.visit(later)
    return AxisFlow(
        extent, tracer.states, tracer.verdicts, tracer.aligned, frozenset(tracer.stopped)
    )


def _seed(node: Node, where: int | Sequence[int] | Placement) -> tuple[Placement, Size | None]:
    if not is_tensor(node):
        raise GraphoptError(
            f"{node} holds no single tensor", where=source_line(node), fix="choose another node"
        )
    if isinstance(where, Placement):
        return where, None
    shape = Shapes().of(node)[0]
    dims = [where] if isinstance(where, int) else list(where)
    if not dims or any(not -len(shape) <= dim < len(shape) for dim in dims):
        raise GraphoptError(
            f"{node} has dims 0 to {len(shape) - 1}, not {where}", where=source_line(node)
        )
    return seed(shape, [dim % len(shape) for dim in dims])


def rule_of(target: Any) -> Rule | None:
    """The rule for an operator: its own, or the elementwise one if torch tags it ``pointwise``."""
    name = name_of(target)
    if name is None or target._schema.is_mutable:
        return None
    if name not in RULES and torch.Tag.pointwise in target.tags:
        return pointwise.elementwise
    return RULES.get(name)


class _Tracer:
    """Visits nodes in graph order and writes down states and verdicts."""

    def __init__(self, seeds: Mapping[Node, State]) -> None:
        self.seeds = seeds
        self.states: dict[Node, State | tuple[State, ...]] = {}
        self.verdicts: dict[Node, Verdict] = {}
        self.aligned: dict[Node, tuple[Aligned, ...]] = {}
        self.stopped: set[Node] = set()
        self.shapes = Shapes()

    def visit(self, node: Node) -> None:
        if node in self.seeds:
            self.states[node] = self.seeds[node]
        elif node.op == "output":
            return
        elif any(parent in self.stopped for parent in node.all_input_nodes):
            self.stopped.add(node)
        elif any(parent in self.states for parent in node.all_input_nodes):
            self._follow(node)

    def _follow(self, node: Node) -> None:
        args: Any = node.args
        parts = self.states.get(args[0]) if node.target is operator.getitem else None
        if isinstance(parts, tuple):
            self._keep(node, parts[args[1]])
        elif node.meta.get("val") is None:
            return  # an assertion
        elif (function := rule_of(node.target)) is not None:
            self._apply(node, function)
        elif isinstance(node.meta["val"], (torch.Tensor, tuple, list)):
            self._stop(node, f"no rule for {name_of(node.target) or node.target}")
        else:
            self._keep(node, MIXED)  # a number computed from numbers

    def _apply(self, node: Node, function: Rule) -> None:
        try:
            outcome = function(Call(node, self.states, self.shapes))
        except Untrackable as why:
            self._stop(node, f"{node.target}: {why}")
            return
        states = outcome.states
        if any(self._is_number(parent) for parent in node.all_input_nodes):
            states = tuple(replace(state, pure=False) if state else MIXED for state in states)
        value = node.meta["val"]
        self._keep(node, states if isinstance(value, (tuple, list)) else states[0])
        self._judge(node, outcome)

    def _judge(self, node: Node, outcome: Outcome) -> None:
        if outcome.aligned:
            self.aligned[node] = outcome.aligned
        if outcome.mix:
            self.verdicts[node] = replace(outcome.mix, where=source_line(node))
        elif any(state and state.places for state in outcome.states):
            self.verdicts[node] = Parallel(outcome.as_is, outcome.random)

    def _is_number(self, parent: Node) -> bool:
        return parent in self.states and not isinstance(
            parent.meta.get("val"), (torch.Tensor, tuple, list)
        )

    def _keep(self, node: Node, state: State | tuple[State, ...]) -> None:
        if state is not None and state != (None,) * _count(state):
            self.states[node] = state

    def _stop(self, node: Node, reason: str) -> None:
        self.verdicts[node] = Unknown(reason, source_line(node))
        self.stopped.add(node)


def _count(state: State | tuple[State, ...]) -> int:
    return len(state) if isinstance(state, tuple) else 0
