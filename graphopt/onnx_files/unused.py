"""Nodes, initializers and functions that no output depends on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from graphopt.onnx_files.document import names_inside
from graphopt.onnx_files.numbers import is_standard
from graphopt.onnx_files.steps import Allowed, Change, OnnxPass, Outcome, Surroundings, label


@dataclass(frozen=True)
class RemoveUnused(OnnxPass):
    """Nodes, initializers and functions that no output depends on are left out."""

    def apply(self, model: Any, around: Surroundings, allowed: Allowed) -> Outcome:  # noqa: ARG002
        if not allowed("unused"):
            return Outcome()
        found = remove_unused(model)
        changes = [
            Change("unused", f"remove unused {what}", tuple(names), bitwise=True)
            for what, names in found.items()
            if names
        ]
        return Outcome(changes)


def remove_unused(model: Any) -> dict[str, list[str]]:
    """Remove what no output depends on; the names of ``nodes``, ``initializers``, ``functions``."""
    return {
        "nodes": [label(node) for node in _unused_nodes(model)],
        "initializers": list(_unused_initializers(model)),
        "functions": _unused_functions(model),
    }


def _unused_nodes(model: Any) -> Iterator[Any]:
    """Remove nodes in graphs and functions whose results nothing reads, last ones first."""
    inner = {id(g): g for g in model.graphs()}
    for holder in (*inner.values(), *model.functions.values()):
        outputs = {id(value) for value in holder.outputs}
        for node in reversed(list(holder)):
            if not any(v.uses() or id(v) in outputs for v in node.outputs):
                yield node
                _release(node)
                holder.remove(node, safe=True)


def _release(node: Any) -> None:
    """What subgraphs of a node that goes read from outside is no longer read."""
    import onnx_ir

    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == onnx_ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        else:
            continue
        for inner in (n for graph in graphs for n in list(graph.all_nodes())):
            for index, value in enumerate(inner.inputs):
                if value is not None:
                    inner.replace_input_with(index, None)


def _unused_initializers(model: Any) -> Iterator[str]:
    """Remove initializers that nothing reads and that are neither inputs nor outputs."""
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not (value.uses() or value.is_graph_input() or value.is_graph_output()):
                del graph.initializers[name]
                yield str(name)


def _unused_functions(model: Any) -> list[str]:
    from onnx_ir.passes.common import RemoveUnusedFunctionsPass

    before = list(model.functions)
    RemoveUnusedFunctionsPass()(model)
    return ["::".join(filter(None, map(str, k))) for k in before if k not in model.functions]


@dataclass(frozen=True)
class RemoveIdentities(OnnxPass):
    """What reads a copy reads the value itself; copies that are outputs of a graph stay."""

    def apply(self, model: Any, around: Surroundings, allowed: Allowed) -> Outcome:  # noqa: ARG002
        inner = names_inside(model)
        changes = []
        for node in [n for n in model.graph if is_standard(n, "Identity")]:
            given, made = node.inputs[0], node.outputs[0]
            hidden = given is None or given.name in inner or made.is_graph_output()
            if hidden or not allowed(str(made.name)):
                continue
            made.replace_all_uses_with(given)
            model.graph.remove(node, safe=True)
            name = label(node)
            changes.append(Change(str(made.name), "remove an identity", (name,), bitwise=True))
        return Outcome(changes)
