"""Activation checkpointing in graphs of Dynamo: regions that are computed again in backward.

Dynamo records ``torch.utils.checkpoint.checkpoint(f, *args)`` as a call of a subgraph. `inlined`
puts the subgraph in its place, so that rewrites see one flat graph, and tells each node its
regions; `regrouped` gathers what rewrites made of a region into subgraphs again; `runnable` lets
them run outside of Inductor. A region may come back in several subgraphs, or without nodes that
others took the place of: that changes what is kept for backward, and no value.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import networkx as nx
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from graphopt.kernels.chunked_rows import chunked_rows
from graphopt.kernels.deferred import deferred
from graphopt.program import REGIONS, copy_graph

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
_POLICY = "_checkpoint_context_fn"
"""Where Dynamo leaves the policy of a selective checkpoint, on the subgraph."""

_KEPT = frozenset({chunked_rows, deferred})
"""What holds next to nothing for backward, and would cost a second time."""

_numbers = itertools.count()


@dataclass(frozen=True)
class Region:
    """One call of ``checkpoint``.

    Attributes:
        settings: its keyword arguments.
        policy: makes the contexts of a selective checkpoint.
    """

    settings: Mapping[str, Any] = field(compare=False)
    policy: Callable[..., Any] | None = field(compare=False)
    number: int = field(default_factory=lambda: next(_numbers))

    def __deepcopy__(self, _memo: object) -> Region:
        return self


def inlined(module: fx.GraphModule) -> fx.GraphModule:
    """The graph with its regions in place, told by ``meta["custom"]``; itself without regions."""
    if not module.graph.find_nodes(op="call_function", target=_CHECKPOINT):
        return module
    made = fx.GraphModule(module, fx.Graph())
    copies: dict[fx.Node, Any] = {}
    _copy(module, made, copies, ())
    output = module.graph.output_node()
    made.graph.output(fx.node.map_arg(output.args[0], copies.__getitem__))
    made.meta.update(module.meta)
    made.recompile()
    return made


def _copy(
    module: fx.GraphModule,
    into: fx.GraphModule,
    copies: dict[fx.Node, Any],
    regions: tuple[Region, ...],
) -> None:
    """All nodes but the output; those with a copy already are left out."""
    for node in module.graph.nodes:
        if node in copies or node.op == "output" or _is_body(node):
            continue
        if node.target is _CHECKPOINT:
            copies[node] = _copy_body(module, node, into, copies, regions)
        elif isinstance(parts := copies.get(_first(node)), tuple):
            copies[node] = parts[node.args[1]]
        else:
            copies[node] = _copy_node(module, node, into, copies, regions)


def _copy_body(
    module: fx.GraphModule,
    call: fx.Node,
    into: fx.GraphModule,
    copies: Mapping[fx.Node, Any],
    regions: tuple[Region, ...],
) -> tuple[Any, ...]:
    """The results of a region, whose nodes are copied."""
    body = getattr(module, str(call.args[0].target))  # type: ignore[union-attr]
    region = Region(dict(call.kwargs), body.meta.get(_POLICY))
    given = fx.node.map_arg(call.args[1:], copies.__getitem__)
    inner = dict(zip(body.graph.find_nodes(op="placeholder"), given, strict=True))
    _copy(body, into, inner, (*regions, region))
    results = fx.node.map_arg(body.graph.output_node().args[0], inner.__getitem__)
    return tuple(results)  # type: ignore[arg-type]


def _copy_node(
    module: fx.GraphModule,
    node: fx.Node,
    into: fx.GraphModule,
    copies: Mapping[fx.Node, Any],
    regions: tuple[Region, ...],
) -> fx.Node:
    made = into.graph.node_copy(node, copies.__getitem__)
    if node.op in ("get_attr", "call_module"):
        made.target = f"_inlined_{made.name}"
        setattr(into, made.target, attrgetter(str(node.target))(module))
    if regions:
        made.meta["custom"] = {**made.meta.get("custom", {}), REGIONS: regions}
    return made


def _is_body(node: fx.Node) -> bool:
    return node.op == "get_attr" and all(u.target is _CHECKPOINT for u in node.users)


def _first(node: fx.Node) -> Any:
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def take_regions(graph: fx.Graph) -> None:
    """Move what a capture carried along in ``meta["custom"]`` to where rewrites hand it on."""
    for node in graph.nodes:
        if regions := node.meta.get("custom", {}).pop(REGIONS, None):
            node.meta[REGIONS] = regions


def regrouped(module: fx.GraphModule, depth: int = 0) -> fx.GraphModule:
    """A copy in which regions are subgraphs again; the graph itself where it has none.

    Args:
        depth: of the regions within the graph's own.
    """
    graph = module.graph
    regions = {n: r for n in graph.nodes if (r := _region_of(n, depth)) is not None}
    if not regions:
        return module
    made, bodies, copies = fx.Graph(), dict[str, Any](), dict[fx.Node, fx.Node]()
    for unit in _units(graph, regions):
        if unit[0] in regions:
            region, name = regions[unit[0]], f"recomputed_{len(bodies)}"
            body = _body(module, unit, region, depth)
            bodies[name] = body.module
            copies |= _called(made, name, body, region, copies)
        else:
            copies[unit[0]] = made.node_copy(unit[0], copies.__getitem__)
    regroup = fx.GraphModule(_attributes(module) | bodies, made)
    regroup.meta.update(module.meta)
    regroup.graph.lint()
    return regroup


def _region_of(node: fx.Node, depth: int) -> Region | None:
    regions = node.meta.get(REGIONS, ())
    able = node.op == "call_function" and node.target not in _KEPT
    return regions[depth] if able and depth < len(regions) else None


def _units(graph: fx.Graph, regions: Mapping[fx.Node, Region]) -> list[list[fx.Node]]:
    """Nodes that run together, in an order in which they can.

    A node joins the last unit of its region, unless that unit would then depend on itself.
    """
    flow: nx.DiGraph[Any] = nx.DiGraph()
    units: list[list[fx.Node]] = []
    unit_of: dict[fx.Node, int] = {}
    last: dict[Region, int] = {}
    for node in graph.nodes:
        region, before = regions.get(node), {unit_of[a] for a in node.all_input_nodes}
        place = last.get(region) if region is not None else None
        if place is None or not before.isdisjoint(nx.descendants(flow, place)):
            place = len(units)
            units.append([])
            flow.add_node(place)
        units[place].append(node)
        unit_of[node] = place
        flow.add_edges_from((other, place) for other in before - {place})
        if region is not None:
            last[region] = place
    return [units[k] for k in nx.lexicographical_topological_sort(flow)]


class _Body(NamedTuple):
    """Some nodes as a subgraph: what it is given, and which of its values are read elsewhere."""

    module: fx.GraphModule
    given: list[fx.Node]
    read: list[fx.Node]


def _body(module: fx.GraphModule, unit: Sequence[fx.Node], region: Region, depth: int) -> _Body:
    inside, graph, copies = set(unit), fx.Graph(), dict[fx.Node, fx.Node]()
    outer = dict.fromkeys(a for n in unit for a in n.all_input_nodes if a not in inside)
    for node in outer:
        held = node.op == "get_attr"
        copies[node] = graph.node_copy(node) if held else graph.placeholder(node.name)
        copies[node].meta.update({k: v for k, v in node.meta.items() if k != REGIONS})
    for node in unit:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    read = [n for n in unit if any(u not in inside for u in n.users)]
    graph.output(tuple(copies[n] for n in read))
    made = regrouped(fx.GraphModule(_attributes(module), graph), depth + 1)
    if region.policy is not None:
        made.meta[_POLICY] = region.policy
    return _Body(made, [n for n in outer if n.op != "get_attr"], read)


def _called(
    graph: fx.Graph, name: str, body: _Body, region: Region, copies: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """The call of a subgraph: for each value that is read elsewhere, what holds it."""
    given = (graph.get_attr(name), *(copies[n] for n in body.given))
    call = graph.call_function(_CHECKPOINT, given, dict(region.settings))
    call.meta["val"] = tuple(n.meta["val"] for n in body.read)
    items = {n: graph.call_function(operator.getitem, (call, i)) for i, n in enumerate(body.read)}
    for node, item in items.items():
        item.meta.update(node.meta)
    return items


def _attributes(module: fx.GraphModule) -> dict[str, Any]:
    """What a graph reads from its module."""
    reads = [n for op in ("get_attr", "call_module") for n in module.graph.find_nodes(op=op)]
    return {str(n.target): attrgetter(str(n.target))(module) for n in reads}


def runnable(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose regions recompute when autograd runs it; the graph itself without regions.

    Called as they are, Dynamo's regions leave random numbers to Inductor: recomputed by anything
    else, a dropout would draw another mask in backward than it drew forward.
    """
    calls = module.graph.find_nodes(op="call_function", target=_CHECKPOINT)
    if not calls:
        return module
    made = fx.GraphModule(module, copy_graph(module.graph))
    for call in made.graph.find_nodes(op="call_function", target=_CHECKPOINT):
        function, *given = call.args
        body = getattr(module, function.target)
        name = f"_{call.name}"
        setattr(made, name, _Recomputed(runnable(body), call.kwargs, body.meta.get(_POLICY)))
        with made.graph.inserting_before(call):
            call.replace_all_uses_with(made.graph.call_module(name, tuple(given)))
        made.graph.erase_node(call)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


class _Recomputed(nn.Module):
    """``checkpoint(body, ...)`` as the region asked for it."""

    def __init__(
        self,
        body: fx.GraphModule,
        settings: Mapping[str, Any],
        policy: Callable[..., Any] | None,
    ) -> None:
        super().__init__()
        self.body, self.settings = body, {**settings, "use_reentrant": False}
        if policy is not None:
            self.settings["context_fn"] = policy

    def forward(self, *inputs: Any) -> Any:
        return checkpoint(self.body, *inputs, **self.settings)
