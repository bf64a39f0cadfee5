"""Regions: convex parts of a program, cut out as modules and put back.

A region is convex when no path leaves it and comes back. Only a convex region can become one call:
otherwise the call would need a result that depends on its own output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter, getitem

import networkx as nx
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import Module

from graphopt.analysis.flow import Flow, between, flow, mutates, reachable
from graphopt.errors import GraphoptError, IllegalRewriteError

_FIXED = ("placeholder", "output", "get_attr")


@dataclass(frozen=True)
class Region:
    """A set of nodes of one graph; placeholders, attributes and the output node never belong."""

    nodes: frozenset[Node]

    def __post_init__(self) -> None:
        if len({node.graph for node in self.nodes}) > 1:
            raise GraphoptError("a region holds nodes of more than one graph")
        if fixed := sorted(node for node in self.nodes if node.op in _FIXED):
            raise GraphoptError(
                f"a region cannot hold the {fixed[0].op} node {fixed[0].name}",
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

    def escape(self, view: Flow) -> tuple[Node, ...]:
        """A path of ``view`` that leaves the region and comes back; empty when it is convex."""
        outside = nx.subgraph_view(view, filter_node=self._surrounding())
        exits = {u: n for n in self.order for u in view.successors(n) if u in outside}
        gone = reachable(outside, exits)
        back = ((p, n) for n in self.order for p in view.predecessors(n) if p in gone)
        if (entry := next(back, None)) is None:
            return ()
        _, path = nx.multi_source_dijkstra(outside, set(exits), target=entry[0])
        return (exits[path[0]], *path, entry[1])

    def is_convex(self, view: Flow) -> bool:
        """Whether no path of ``view`` leaves the region and comes back."""
        return not self.escape(view)

    def convex_closure(self, view: Flow) -> Region:
        """The smallest convex region that contains this one."""
        if not self.nodes:
            return self
        first, last = self.order[0], self.order[-1]
        window = nx.subgraph_view(view, filter_node=lambda n: not (n < first or last < n))
        return Region(frozenset(between(window, self.nodes, self.nodes)))

    def _surrounding(self) -> Callable[[Node], bool]:
        """Whether a node lies outside, and early enough for a path from it to come back."""
        return lambda node: node not in self.nodes and node < self.order[-1]


def grow(view: Flow, seed: Region, supported: Callable[[Node], bool]) -> Region:
    """The convex ``seed`` with supported neighbours added, in program order, until none fits.

    Linear in the part of ``view`` that the region reaches or that reaches it.
    """
    _require_convex(seed, view)
    inside = set(seed.nodes)
    after = reachable(view, inside) - inside
    before = reachable(view, inside, backward=True) - inside
    queue = sorted(_neighbours(view, inside) - inside)
    while queue:
        node = heappop(queue)
        late = node in after
        beside, rivals = (view.pred, after) if late else (view.succ, before)
        if node in inside or not _joins(node, supported) or any(n in rivals for n in beside[node]):
            continue
        inside.add(node)
        rivals.discard(node)
        unseen = _spread(view, node, late, lambda n: n in inside or n in after or n in before)
        (before if late else after).update(unseen)
        for neighbour in _neighbours(view, [node]) - inside:
            heappush(queue, neighbour)
    return Region(frozenset(inside))


def partition(view: Flow, supported: Callable[[Node], bool]) -> list[Region]:
    """All supported nodes in the fewest convex regions that can run one after the other.

    A node's stage is the largest number of changes from unsupported to supported on a path to it,
    and a region is one stage. A path with k changes needs k + 1 regions in any partition, so none
    has fewer. An item of a tuple stays with the operator that makes the tuple.
    """
    joins: dict[Node, bool] = {}
    stage: dict[Node, int] = {}
    found: defaultdict[int, set[Node]] = defaultdict(set)
    for node in view:
        source = node.args[0] if node.target is getitem else None
        joins[node] = joins[source] if isinstance(source, Node) else _joins(node, supported)
        entered = joins[node]
        stage[node] = max(
            (stage[p] + (entered and not joins[p] and p.op not in _FIXED) for p in view.pred[node]),
            default=0,
        )
        if joins[node]:
            found[stage[node]].add(node)
    return [Region(frozenset(found[key])) for key in sorted(found)]


def extract(region: Region) -> GraphModule:
    """The region as a module: takes ``region.inputs``, returns the tuple of ``region.outputs``.

    Nodes keep their metadata; a size that the region reads becomes an ``int`` input. Attributes and
    submodules are shared with the module that owns the graph, not copied.
    """
    if not region.nodes:
        raise GraphoptError("an empty region cannot be extracted")
    graph = Graph()
    copies: dict[Node, Node] = {}
    for producer in region.inputs:
        copies[producer] = graph.placeholder(producer.name)
        copies[producer].meta = dict(producer.meta)
    attributes = {p: None for n in region.order for p in n.all_input_nodes if p.op == "get_attr"}
    for node in (*attributes, *region.order):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    result = graph.output(tuple(copies[node] for node in region.outputs))
    result.meta["val"] = tuple(node.meta.get("val") for node in region.outputs)
    return GraphModule(region.order[0].graph.owning_module or {}, graph, "Region")


def replace_region(
    graph: Graph, region: Region, submodule: Module, *, inline: bool = True, name: str = "region"
) -> tuple[Node, ...]:
    """Put ``submodule``, called on ``region.inputs``, in place of ``region``.

    Inlined it must be a `GraphModule`, as `extract` makes; otherwise any module with that signature
    becomes one ``call_module`` whose attribute is ``name``, numbered where taken. Nodes between the
    region's first and last that need its results move behind it; all others stay where they are.
    The owning module has to be recompiled afterwards.

    Returns:
        The nodes that now stand for ``region.outputs``, in order.

    Raises:
        IllegalRewriteError: the region is not convex, an operator within its span writes in place,
            or ``submodule`` does not take and return what the region does. Nothing is changed then.
    """
    view = _require_legal(graph, region)
    if inline:
        rows = _require_signature(region, submodule)
    owner = graph.owning_module
    last = region.order[-1]
    late = reachable(view, region.nodes) - region.nodes
    for node in sorted(late, reverse=True):
        last.append(node)
    with graph.inserting_before(last.next):
        made = _inline(graph, region, submodule) if inline else _call(graph, region, submodule, name)
    for old, new in zip(region.outputs, made, strict=True):
        old.replace_all_uses_with(new)
    for node in reversed(region.order):
        graph.erase_node(node)
    return made
