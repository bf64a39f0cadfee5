"""Regions: convex parts of a program.

A region is convex when no path leaves it and comes back. Only a convex region can become one call:
otherwise the call would need a result that depends on its own output.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from operator import getitem

import networkx as nx
from torch.fx import Node

from graphopt.analysis.flow import Flow, between, reachable
from graphopt.errors import GraphoptError

FIXED = ("placeholder", "output", "get_attr")
"""Kinds of node that never belong to a region."""


@dataclass(frozen=True)
class Region:
    """A set of nodes of one graph, all of them calls."""

    nodes: frozenset[Node]

    def __post_init__(self) -> None:
        if len({node.graph for node in self.nodes}) > 1:
            raise GraphoptError("a region holds nodes of more than one graph")
        if fixed := [node for node in self.nodes if node.op in FIXED]:
            raise GraphoptError(
                f"a region cannot hold {min(fixed)}, whose kind is {min(fixed).op}",
                fix="leave the program's inputs, attributes and output outside",
            )

    @cached_property
    def order(self) -> tuple[Node, ...]:
        """The nodes in program order."""
        return tuple(sorted(self.nodes))

    @cached_property
    def inputs(self) -> tuple[Node, ...]:
        """Producers outside that the region reads, in order of first use; attributes excepted."""
        read = (producer for node in self.order for producer in node.all_input_nodes)
        outside = (p for p in read if p not in self.nodes and p.op != "get_attr")
        return tuple(dict.fromkeys(outside))

    @cached_property
    def outputs(self) -> tuple[Node, ...]:
        """Nodes with a user outside, the program's output included, in program order."""
        return tuple(n for n in self.order if any(u not in self.nodes for u in n.users))

    @cached_property
    def span(self) -> tuple[Node, ...]:
        """Every node of the graph from the region's first to its last, in program order."""
        found = list(self.order[:1])
        while found and found[-1] is not self.order[-1]:
            found.append(found[-1].next)
        return tuple(found)

    def escape(self, view: Flow) -> tuple[Node, ...]:
        """A path of ``view`` that leaves the region and comes back; empty when it is convex."""
        inner = set(self.span) - self.nodes
        outside = nx.subgraph_view(view, filter_node=inner.__contains__)
        exits = {u: n for n in self.order for u in view.successors(n) if u in inner}
        gone = reachable(outside, exits)
        back = ((p, n) for n in self.order for p in view.predecessors(n) if p in gone)
        if (entry := next(back, None)) is None:
            return ()
        paths = nx.multi_source_dijkstra_path(outside, set(exits))
        path = paths[entry[0]]
        return (exits[path[0]], *path, entry[1])

    def is_convex(self, view: Flow) -> bool:
        """Whether no path of ``view`` leaves the region and comes back."""
        return not self.escape(view)

    def convex_closure(self, view: Flow) -> Region:
        """The smallest convex region that contains this one."""
        window = nx.subgraph_view(view, filter_node=set(self.span).__contains__)
        return Region(frozenset(between(window, self.nodes, self.nodes)))


def grow(view: Flow, seed: Region, supported: Callable[[Node], bool]) -> Region:
    """The convex ``seed`` with supported neighbours added, in program order, until none fits.

    Linear in the part of ``view`` that the region reaches or that reaches it.
    """
    if path := seed.escape(view):
        raise GraphoptError(f"the seed is not convex: {spell(path)}", fix="take its convex_closure")
    inside = set(seed.nodes)
    after = reachable(view, inside) - inside
    before = reachable(view, inside, backward=True) - inside
    queue = [n for node in seed.nodes for n in nx.all_neighbors(view, node)]
    heapify(queue)
    while queue:
        node = heappop(queue)
        late = node in after
        beside, rivals = (view.pred, after) if late else (view.succ, before)
        if node in inside or not _joins(node, supported) or any(n in rivals for n in beside[node]):
            continue
        inside.add(node)
        rivals.discard(node)
        fresh = _unseen(view, node, (inside, after, before), backward=late)
        (before if late else after).update(fresh)
        for neighbour in nx.all_neighbors(view, node):
            heappush(queue, neighbour)
    return Region(frozenset(inside))


def partition(view: Flow, supported: Callable[[Node], bool]) -> list[Region]:
    """All supported nodes in the fewest convex regions that can run one after the other.

    A node's stage is the largest number of runs of supported nodes completed on a path to it, and
    a region is one stage. The path with most runs needs as many regions in any partition, so none
    has fewer. An item of a tuple stays with the operator that makes the tuple.
    """
    joins: dict[Node, bool] = {}
    stage: dict[Node, int] = {}
    found: defaultdict[int, set[Node]] = defaultdict(set)
    for node in view:
        source = node.args[0] if node.target is getitem else None
        joins[node] = joins[source] if isinstance(source, Node) else _joins(node, supported)
        left = (stage[p] + (joins[p] and not joins[node]) for p in view.pred[node])
        stage[node] = max(left, default=0)
        if joins[node]:
            found[stage[node]].add(node)
    return [Region(frozenset(found[key])) for key in sorted(found)]


def spell(path: Iterable[Node]) -> str:
    """A path of the flow in words."""
    return " -> ".join(node.name for node in path)


def _joins(node: Node, supported: Callable[[Node], bool]) -> bool:
    return node.op not in FIXED and supported(node)


def _unseen(view: Flow, node: Node, known: tuple[set[Node], ...], *, backward: bool) -> set[Node]:
    """What ``node`` reaches without passing through the known nodes, itself excepted."""
    unknown = nx.subgraph_view(
        view, filter_node=lambda n: n is node or not any(n in part for part in known)
    )
    return reachable(unknown, [node], backward=backward) - {node}
