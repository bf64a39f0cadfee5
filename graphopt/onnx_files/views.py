"""The nodes of an ONNX model as the HTML report shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from graphopt.onnx_files.steps import label
from graphopt.report.model import NodeView

_LONGEST = 120
"""Characters of attributes that are shown of a node."""


def node_views(
    model: Any, rewritten: Mapping[str, tuple[str, ...]] | None = None
) -> list[NodeView]:
    """Inputs, initializers, nodes and outputs of the main graph.

    Args:
        rewritten: rules by the labels of nodes that they made.
    """
    graph = model.graph
    names: dict[Any, str] = {}
    return [
        *(_placed(v, "input", names) for v in graph.inputs),
        *(_placed(v, "constant", names) for v in graph.initializers.values() if v not in names),
        *_nodes(graph, names, rewritten or {}),
        NodeView("output", "output", tuple(names.get(v, "") for v in graph.outputs), "", "", None),
    ]


def _placed(value: Any, op: str, names: dict[Any, str]) -> NodeView:
    names[value] = str(value.name)
    target = names[value] if op == "constant" else None
    return NodeView(names[value], op, (), _shape(value), "", None, target=target)


def _nodes(
    graph: Any, names: dict[Any, str], rewritten: Mapping[str, tuple[str, ...]]
) -> Iterator[NodeView]:
    taken = set(names.values())
    for node in graph:
        name = unique = label(node)
        number = 1
        while unique in taken:
            number += 1
            unique = f"{name}.{number}"
        taken.add(unique)
        names.update((value, unique) for value in node.outputs)
        read = dict.fromkeys(names[v] for v in node.inputs if v is not None and v in names)
        yield NodeView(
            unique,
            f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
            tuple(read),
            _shape(node.outputs[0]) if node.outputs else "",
            _module(node),
            None,
            rewritten.get(name, ()),
            _attributes(node),
        )


def _module(node: Any) -> str:
    """Exporters name nodes by the path of their module: ``/encoder/layer.0/MatMul``."""
    parts = str(node.name or "").strip("/").split("/")[:-1]
    return ".".join(part for part in parts if part)


def _shape(value: Any) -> str:
    kind = str(getattr(value, "dtype", None) or "").lower()
    if value.shape is None:
        return kind
    return f"{kind}[{', '.join(str(size) for size in value.shape)}]"


def _attributes(node: Any) -> str:
    shown = []
    for name, attribute in node.attributes.items():
        plain = attribute.type.name in ("INT", "INTS", "FLOAT", "FLOATS", "STRING")
        shown.append(f"{name}={attribute.value if plain else attribute.type.name.lower()}")
    return ", ".join(shown)[:_LONGEST]
