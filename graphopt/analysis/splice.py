"""Cutting a region out of a program as a module, and putting a module in a region's place."""

from __future__ import annotations

from itertools import chain, count
from operator import attrgetter, getitem
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module, Parameter

from graphopt.analysis.flow import flow, mutates, reachable
from graphopt.analysis.regions import Region, spell
from graphopt.errors import GraphoptError, IllegalRewriteError


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

    Inlined it must be a `GraphModule`, as `extract` makes; otherwise any module that returns a
    tuple becomes one ``call_module`` whose attribute is ``name``, numbered where taken. Nodes
    between the region's first and last that need its results move behind it, in their order; all
    others stay where they are. The owning module has to be recompiled afterwards.

    Returns:
        The nodes that now stand for ``region.outputs``, in order.

    Raises:
        IllegalRewriteError: the region is not convex, an operator within its span writes in place,
            or ``submodule`` does not take and return what the region does. Nothing is changed then.
    """
    if (owner := graph.owning_module) is None:
        raise IllegalRewriteError("no module owns this graph", fix="make a GraphModule of it")
    late = _late_users(graph, region)
    _require_signature(region, submodule, inline)
    last = region.order[-1]
    for node in sorted(late, reverse=True):
        last.append(node)
    with graph.inserting_before(last.next):
        made = (
            _inline(owner, region, submodule)
            if isinstance(submodule, GraphModule) and inline
            else _call(owner, region, submodule, name)
        )
    for old, new in zip(region.outputs, made, strict=True):
        old.replace_all_uses_with(new)
    for node in reversed(region.order):
        graph.erase_node(node)
    return made


def _late_users(graph: Graph, region: Region) -> set[Node]:
    """The nodes within the span that need the region's results, once its place is known legal."""
    if not region.nodes or any(n._erased or n.graph is not graph for n in region.nodes):
        raise IllegalRewriteError("the region is empty, or not a part of this graph")
    if writers := [node for node in region.span if mutates(node)]:
        raise IllegalRewriteError(
            f"{writers[0]} writes in place, and nothing may move across it",
            where=_where(writers[0]),
            fix="bring the program into functional form first",
        )
    view = flow(region.span, effects=True)
    if path := region.escape(view):
        raise IllegalRewriteError(
            f"the region is not convex: {spell(path)}",
            where=_where(path[1]),
            fix="take the region's convex_closure, or leave out one end of this path",
        )
    return reachable(view, region.nodes) - region.nodes


def _require_signature(region: Region, submodule: Module, inline: bool) -> None:
    """Refuse a module that cannot stand for the region."""
    if not isinstance(submodule, GraphModule):
        if inline:
            kind = type(submodule).__name__
            raise IllegalRewriteError(f"a {kind} has no graph to inline", fix="use inline=False")
        return
    taken = len(submodule.graph.find_nodes(op="placeholder"))
    given = _results(submodule)
    if (taken, len(given)) != (len(region.inputs), len(region.outputs)):
        raise IllegalRewriteError(
            f"the region takes {len(region.inputs)} values and returns {len(region.outputs)}; "
            f"its replacement takes {taken} and returns {len(given)}"
        )
    for old, new in zip(region.outputs, given, strict=True):
        if _kind(old) and _kind(new) and _kind(old) != _kind(new):
            raise IllegalRewriteError(
                f"{old} is {_kind(old)}, its replacement {new} is {_kind(new)}", where=_where(old)
            )


def _results(submodule: GraphModule) -> tuple[Node, ...]:
    """The nodes that ``submodule`` returns."""
    given = submodule.graph.output_node().args[0]
    if not isinstance(given, tuple | list):
        raise IllegalRewriteError(f"the replacement returns {given}", fix="return a tuple")
    nodes = tuple(node for node in given if isinstance(node, Node))
    if len(nodes) != len(given):
        raise IllegalRewriteError(f"the replacement returns constants: {given}", fix="return nodes")
    return nodes


def _inline(owner: Module, region: Region, submodule: GraphModule) -> tuple[Node, ...]:
    """Copy the nodes of ``submodule`` to the graph's insertion point."""
    inner = submodule.graph
    copies = dict(zip(inner.find_nodes(op="placeholder"), region.inputs, strict=True))
    region.order[0].graph.graph_copy(inner, copies)
    for node in inner.nodes:
        if node.op in ("get_attr", "call_module"):
            name = str(node.target)
            copies[node].target = _adopt(owner, name, attrgetter(name)(submodule))
    return tuple(copies[node] for node in _results(submodule))


def _call(owner: Module, region: Region, submodule: Module, name: str) -> tuple[Node, ...]:
    """Insert one call of ``submodule`` and an item of its result for each output."""
    graph = region.order[0].graph
    called = graph.call_module(_adopt(owner, name, submodule), region.inputs)
    called.meta = dict(region.order[-1].meta)
    called.meta["val"] = tuple(node.meta.get("val") for node in region.outputs)
    items = tuple(graph.call_function(getitem, (called, i)) for i in range(len(region.outputs)))
    for item, node in zip(items, region.outputs, strict=True):
        item.meta = dict(node.meta)
    return items


def _adopt(owner: Module, name: str, value: Any) -> str:
    """Make ``value`` an attribute of ``owner`` and return its name: ``name`` where that is free."""
    if _attribute(owner, name) is value:
        return name
    flat = name.replace(".", "_")
    free = next(
        n for n in chain([flat], (f"{flat}_{i}" for i in count(1))) if not hasattr(owner, n)
    )
    if isinstance(value, torch.Tensor) and not isinstance(value, Parameter):
        owner.register_buffer(free, value)
    else:
        setattr(owner, free, value)
    return free


def _attribute(owner: Module, name: str) -> Any:
    try:
        return attrgetter(name)(owner)
    except AttributeError:
        return None


def _kind(node: Node) -> str:
    """What ``node`` gives, as far as it must agree for one node to replace another."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"a {value.dtype} tensor with {value.ndim} dims"
    return "" if value is None else f"a {type(value).__name__}"


def _where(node: Node) -> str:
    """The innermost line of the user's code that made ``node``, or its name."""
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    return next((line.strip() for line in reversed(trace) if "File " in line), node.name)
