"""Parts of a program that are learned together: blocks where it repeats them, else single calls.

A part is what runs between two places of the order in which nodes run. Whatever stands between
them, no path leaves such a part and comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from graphopt.analysis.blocks import find_blocks
from graphopt.analysis.flow import ancestors
from graphopt.analysis.regions import FIXED

_LOW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Segment:
    """Calls that run one after the other.

    Attributes:
        nodes: those that the outputs, or what is looked at, depend on.
        outputs: what later calls read; where none does, what the program returns.
    """

    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @cached_property
    def reads(self) -> tuple[fx.Node, ...]:
        """What is computed or held elsewhere, in order of first use."""
        own = set(self.nodes)
        read = (n for node in self.nodes for n in node.all_input_nodes)
        return tuple(dict.fromkeys(n for n in read if n not in own))

    @cached_property
    def _last(self) -> dict[fx.Node, list[fx.Node]]:
        """What nobody reads behind a call."""
        last = {n: n for n in self.nodes}
        for node in self.nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        found: dict[fx.Node, list[fx.Node]] = {}
        for value, node in last.items():
            if value not in self.outputs:
                found.setdefault(node, []).append(value)
        return found

    def run(
        self,
        given: Mapping[fx.Node, Any],
        stands: Mapping[fx.Node, Callable[..., Any]] | None = None,
    ) -> list[Any]:
        """What it gives from what it reads: half precision is float32 in it.

        Args:
            stands: what computes a call in place of its operator.
        """
        values, stands = {node: widened(value) for node, value in given.items()}, stands or {}
        for node in self.nodes:
            args, kwargs = map_aggregate(
                (node.args, node.kwargs),
                lambda a: values[a] if isinstance(a, fx.Node) else _wide(a),
            )
            function: Any = stands.get(node, node.target)
            values[node] = function(*args, **kwargs)
            for done in self._last.get(node, ()):
                values.pop(done, None)
        return [values[node] for node in self.outputs]


def segments(graph: fx.Graph, wanted: Iterable[fx.Node]) -> list[Segment]:
    """Parts of a graph that hold all of ``wanted``: repeated blocks, and calls by themselves."""
    order = [n for n in graph.nodes if n.op not in FIXED]
    place, wanted = {node: i for i, node in enumerate(order)}, set(wanted)
    left, end = sorted(place[node] for node in wanted), 0
    spans = []
    for first, stop in _blocks(graph, place):
        start = max(first, end)  # what blocks share belongs to the first
        inside = [i for i in left if start <= i < stop]
        if inside:
            spans.append((start, stop))
            left, end = [i for i in left if i not in inside], stop
    spans += [(i, i + 1) for i in left]
    return [_segment(order[start:stop], wanted) for start, stop in sorted(spans)]


def _segment(nodes: list[fx.Node], wanted: set[fx.Node]) -> Segment:
    own = set(nodes)
    shown = [n for n in nodes if any(u not in own for u in n.users)]
    read = [n for n in shown if any(u not in own and u.op != "output" for u in n.users)]
    outputs = tuple(read or shown)
    needed = ancestors((*outputs, *(own & wanted)))
    return Segment(tuple(n for n in nodes if n in needed), outputs)


def _blocks(graph: fx.Graph, place: Mapping[fx.Node, int]) -> list[tuple[int, int]]:
    """From where to where blocks run, in order."""
    spans = []
    for group in find_blocks(graph):
        for region in group.instances:
            places = [place[n] for n in region.nodes if n in place]
            if places:
                spans.append((min(places), max(places) + 1))
    return sorted(spans)


def widened(value: Any) -> Any:
    """A tensor of half precision as float32, one made in inference mode as any other."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(torch.float32) if value.dtype in _LOW else value
    return value.clone() if value.is_inference() else value


def _wide(argument: Any) -> Any:
    """A dtype of half precision as float32."""
    return torch.float32 if isinstance(argument, torch.dtype) and argument in _LOW else argument
