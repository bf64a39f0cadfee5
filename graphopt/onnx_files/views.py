"""The nodes of an ONNX model as the HTML report shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from graphopt.onnx_files.origins import module_of, source_of
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
    views = [
        *(_placed(v, "input", names) for v in graph.inputs),
        *(_placed(v, "constant", names) for v in graph.initializers.values() if v not in names),
        *_nodes(graph, names, rewritten or {}),
    ]
    end = _unused("output", {view.name for view in views})
    read = tuple(names[v] for v in graph.outputs if v in names)
    return [*views, NodeView(end, "output", read, "", "", None)]


def _unused(name: str, taken: set[str]) -> str:
    """The name, or the first of it with a number that is not taken."""
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}.{number}"
    return found


def _placed(value: Any, op: str, names: dict[Any, str]) -> NodeView:
    names[value] = str(value.name)
    target = names[value] if op == "constant" else None
    return NodeView(names[value], op, (), _shape(value), "", None, target=target)


def _nodes(
    graph: Any, names: dict[Any, str], rewritten: Mapping[str, tuple[str, ...]]
) -> Iterator[NodeView]:
    taken = set(names.values())
    for node in graph:
        name = label(node)
        unique = _unused(name, taken)
        taken.add(unique)
        names.update((value, unique) for value in node.outputs)
        read = dict.fromkeys(names[v] for v in node.inputs if v is not None and v in names)
        yield NodeView(
            unique,
            f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
            tuple(read),
            _shape(node.outputs[0]) if node.outputs else "",
            module_of(node),
            source_of(node),
            rewritten.get(name, ()),
            _attributes(node),
        )


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
