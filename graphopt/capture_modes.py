"""Regions of a trace in which gradients are off, made explicit.

torch records ``with torch.no_grad():`` as a call of a subgraph. Decomposition runs the subgraph in
place and forgets the mode, so that gradients would flow where the user stopped them. Here such
subgraphs are inlined, and every value that enters one from outside is detached first: what is
computed inside then has no history, exactly as in eager mode.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, fx

from graphopt.program import is_mutating

_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_DETACH = torch.ops.aten.detach.default
GRADIENTS = "graphopt_gradients"


def inline_grad_modes(module: fx.GraphModule, trained: Collection[str] = ()) -> list[fx.Node]:
    """Inline all regions of ``module`` and its subgraphs.

    Args:
        trained: names of the placeholders that require gradients.

    Returns:
        Nodes that write, while gradients are off, a value that has a gradient history. Eager mode
        keeps that history as if nothing had been written, which no functional graph can say.
    """
    _flatten(module, True)
    starts = {n for n in module.graph.find_nodes(op="placeholder") if n.name in trained}
    return list(_stop_gradients(module, starts))


def changes_mode(node: fx.Node) -> bool:
    """Whether the node is a region with a gradient or autocast mode of its own."""
    return node.target in (_SET_GRAD, _AUTOCAST)


def _flatten(module: fx.GraphModule, enabled: bool) -> None:
    """Inline regions; afterwards every node carries the mode under which it ran."""
    for node in list(module.graph.nodes):
        if node.target is _SET_GRAD:
            inner = getattr(module, node.args[1].target)
            _flatten(inner, bool(node.args[0]))
            _inline(module, node, inner)
            continue
        if node.op not in ("placeholder", "get_attr", "output"):
            node.meta.setdefault(GRADIENTS, enabled)
        for body in _bodies(module, node):
            _flatten(body, enabled)
    module.graph.lint()
    module.recompile()


def _bodies(module: fx.GraphModule, node: fx.Node) -> Iterator[fx.GraphModule]:
    """Subgraphs that a higher order operator runs."""
    if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
        for argument in node.all_input_nodes:
            if argument.op == "get_attr":
                body = getattr(module, str(argument.target), None)
                if isinstance(body, fx.GraphModule):
                    yield body


def _inline(module: fx.GraphModule, call: fx.Node, inner: fx.GraphModule) -> None:
    copies: dict[fx.Node, fx.node.Argument] = {}
    given = iter(call.args[2:])
    results: tuple[fx.node.Argument, ...] = ()
    with module.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "output":
                results = fx.node.map_arg(node.args[0], copies.__getitem__)  # type: ignore[assignment]
            else:
                copies[node] = _copy_into(module, inner, node, copies)
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[arg-type,index]
        module.graph.erase_node(user)
    body = call.args[1]
    module.graph.erase_node(call)
    if isinstance(body, fx.Node) and not body.users:
        module.graph.erase_node(body)


def _copy_into(
    module: fx.GraphModule,
    inner: fx.GraphModule,
    node: fx.Node,
    copies: dict[fx.Node, fx.node.Argument],
) -> fx.Node:
    made = module.graph.node_copy(node, copies.__getitem__)  # type: ignore[arg-type]
    if node.op == "get_attr":
        name = f"_inlined_{made.name}"
        setattr(module, name, getattr(inner, str(node.target)))
        made.target = name
    return made


def _stop_gradients(module: fx.GraphModule, starts: set[fx.Node]) -> Iterator[fx.Node]:
    """Detach what enters a node that ran without gradients; yields writes of differentiables."""
    history, stopped = set(starts), dict[fx.Node, fx.Node]()
    for node in list(module.graph.nodes):
        for body in _bodies(module, node):
            yield from _stop_gradients(body, _inner_starts(body, node, history))
        if is_mutating(node.target) and any(_unsaid(w, node, history) for w in _written(node)):
            yield node
        if node.meta.get(GRADIENTS, True) or _handles_modes(node):
            if _is_differentiable(node) and not history.isdisjoint(node.all_input_nodes):
                history.add(node)
            continue
        for source in filter(_enters, node.all_input_nodes):
            if source not in stopped:
                stopped[source] = _detached(module.graph, source, before=node)
            node.replace_input_with(source, stopped[source])
    module.recompile()


def _inner_starts(body: fx.GraphModule, call: fx.Node, history: set[fx.Node]) -> set[fx.Node]:
    """Placeholders of a subgraph whose operands have a history."""
    operands = [a for a in call.all_input_nodes if a.op != "get_attr"]
    inner = list(body.graph.find_nodes(op="placeholder"))
    if len(inner) != len(operands):
        return set(inner)
    return {i for i, o in zip(inner, operands, strict=True) if o in history}


def _handles_modes(node: fx.Node) -> bool:
    return node.target is _AUTOCAST


def _is_differentiable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return any(isinstance(v, Tensor) and v.is_floating_point() for v in value)
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _enters(node: fx.Node) -> bool:
    """Whether a value comes from outside the region and could carry gradients into it."""
    made_inside = node.meta.get(GRADIENTS, True) is False
    return isinstance(node.meta.get("val"), Tensor) and _is_differentiable(node) and not made_inside


def _written(node: fx.Node) -> set[fx.Node]:
    """Arguments that the node's operator writes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return set()
    schema = node.target._schema.arguments
    pairs = zip(schema, node.args, strict=False)
    written = [a for s, a in pairs if s.alias_info is not None and s.alias_info.is_write]
    flat: Iterable[object] = [b for a in written for b in (a if isinstance(a, list) else [a])]
    return {a for a in flat if isinstance(a, fx.Node)}


def _unsaid(written: fx.Node, writer: fx.Node, history: set[fx.Node]) -> bool:
    """Whether autograd does not see the write: gradients are off, or it goes through `detach`."""
    hidden, node = writer.meta.get(GRADIENTS, True) is False, written
    while isinstance(node.target, torch._ops.OpOverload) and not is_mutating(node.target):
        hidden = hidden or node.target is _DETACH
        aliases = any(r.alias_info is not None for r in node.target._schema.returns)
        if not aliases or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return hidden and node in history


def _detached(graph: fx.Graph, source: fx.Node, *, before: fx.Node) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(_DETACH, (source,))
    node.meta.update(source.meta)
    node.meta[GRADIENTS] = False
    return node
