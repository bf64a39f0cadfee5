"""The data flow of an FX graph as a networkx graph, and the few questions that analyses ask of it.

FX stays the storage and networkx the library: a view is built when questions are asked and thrown
away when the graph changes. Nodes enter the view in program order, so iterating over a view is
iterating over the program.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import networkx as nx
import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.nn import Module

if TYPE_CHECKING:
    Flow: TypeAlias = nx.DiGraph[Node]
else:
    Flow = nx.DiGraph

_ENTRY: Any = "entry"


def flow(nodes: Graph | Sequence[Node], *, effects: bool = False) -> Flow:
    """The edges producer -> user among the nodes of a graph, or of a slice of one in program order.

    Each edge carries ``positions``, the indices in ``leaves(user)`` at which the producer stands.
    With ``effects`` nodes whose order is part of the meaning (see ``is_ordered``) are chained by
    further edges with ``positions=()``, so that convexity and reordering respect them.
    """
    nodes = list(nodes.nodes) if isinstance(nodes, Graph) else nodes
    view: Flow = nx.DiGraph()
    view.add_nodes_from(nodes)
    for user in nodes:
        for position, leaf in enumerate(leaves(user)):
            if isinstance(leaf, Node) and leaf in view:
                known = view.edges[leaf, user]["positions"] if view.has_edge(leaf, user) else ()
                view.add_edge(leaf, user, positions=(*known, position))
    if effects:
        ordered = [node for node in nodes if is_ordered(node)]
        view.add_edges_from((e for e in pairwise(ordered) if not view.has_edge(*e)), positions=())
    return view


def leaves(node: Node) -> tuple[Any, ...]:
    """The arguments of ``node``, lists and slices opened, keyword arguments last by name."""
    found: list[Any] = []
    map_aggregate((node.args, dict(sorted(node.kwargs.items()))), found.append)
    return tuple(found)


def mutates(node: Node) -> bool:
    """Whether ``node`` writes into one of its arguments (never, in the functional dialect)."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if isinstance(node.target, HigherOrderOperator) and "mutation" in node.target.name():
        return True
    return any(mutates(inner) for body in bodies(node) or () for inner in body.nodes)


def is_ordered(node: Node) -> bool:
    """Whether moving ``node`` past another such node may change results.

    True for operators that draw random numbers, and for calls into code that cannot be seen.
    """
    if isinstance(node.target, OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    graphs = bodies(node)
    return graphs is None or any(is_ordered(inner) for graph in graphs for inner in graph.nodes)


def bodies(node: Node) -> list[Graph] | None:
    """The graphs that ``node`` runs; None where it runs code that has no graph."""
    if node.op == "call_module":
        names = [str(node.target)]
    elif isinstance(node.target, HigherOrderOperator):
        names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    else:
        return []
    owner = node.graph.owning_module
    called = [attrgetter(name)(owner) if owner is not None else None for name in names]
    if any(c is None or (isinstance(c, Module) and not isinstance(c, GraphModule)) for c in called):
        return None
    return [c.graph for c in called if isinstance(c, GraphModule)]


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """``nodes`` and every node that one of them depends on; as `reachable`, without a view."""
    found: set[Node] = set()
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node not in found:
            found.add(node)
            queue += node.all_input_nodes
    return found


def dependents(nodes: Iterable[Node]) -> dict[Node, None]:
    """The calls that depend on one of ``nodes``, themselves excepted, in program order."""
    sources = set(nodes)
    seen, found = set(sources), dict[Node, None]()
    for node in next(iter(sources)).graph.nodes if sources else ():
        if node.op == "call_function" and not seen.isdisjoint(node.all_input_nodes):
            seen.add(node)
            found[node] = None
    return {node: None for node in found if node not in sources}


def reachable(view: Flow, sources: Iterable[Node], *, backward: bool = False) -> set[Node]:
    """``sources`` and every node that depends on one (``backward``: that one depends on)."""
    layers = nx.bfs_layers(view.reverse(copy=False) if backward else view, set(sources))
    return set(chain.from_iterable(layers))


def between(view: Flow, sources: Iterable[Node], targets: Iterable[Node]) -> set[Node]:
    """The nodes on some path from a source to a target, ends included where a path exists."""
    return reachable(view, sources) & reachable(view, targets, backward=True)


def levels(view: Flow) -> Iterator[list[Node]]:
    """Nodes grouped so that each depends only on earlier groups."""
    return iter(nx.topological_generations(view))


def dominators(view: Flow, sources: Iterable[Node] | None = None) -> dict[Node, Node | None]:
    """The immediate dominator of every node that ``sources`` reach; None where there is none.

    Sources are the nodes without producers unless given; paths that start elsewhere (from the
    parameters, say) do not count. Cooper, Harvey and Kennedy, "A simple, fast dominance algorithm".
    """
    roots = [n for n in view if not view.in_degree(n)] if sources is None else list(sources)
    rooted: nx.DiGraph[Any] = nx.DiGraph(view.edges)
    rooted.add_edges_from((_ENTRY, root) for root in roots)
    found = nx.immediate_dominators(rooted, _ENTRY)
    found.pop(_ENTRY, None)
    return {node: None if parent is _ENTRY else parent for node, parent in found.items()}
