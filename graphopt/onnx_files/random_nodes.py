"""Operators whose results are not decided by their inputs, or that may do what nobody knows."""

from __future__ import annotations

from typing import Any

STANDARD = frozenset({"", "ai.onnx", "ai.onnx.ml"})
"""Domains whose operators are known; training operators are of no use here."""
KNOWN = STANDARD | {"com.microsoft"}

_RANDOM = frozenset(
    {
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        *("Multinomial", "Bernoulli"),
    }
)


def is_random(node: Any) -> bool:
    """Whether an ``onnx_ir`` node draws numbers, as a dropout in training mode does."""
    if node.op_type == "Dropout" and node.domain in STANDARD:
        return len(node.inputs) > 2 and node.inputs[2] is not None
    return node.op_type in _RANDOM and node.domain in STANDARD


def is_deterministic(node: Any, functions: Any = ()) -> bool:
    """Whether two such nodes with equal inputs and attributes give the same: of a known domain, not
    random, and so for every node in its subgraphs.

    Args:
        functions: identifiers of the model's own functions, which are as what they hold: not known.
    """
    inner = [n for a in node.attributes.values() for g in _graphs(a) for n in g.all_nodes()]
    every = [node, *inner]
    return all(
        n.domain in KNOWN and not is_random(n) and n.op_identifier() not in functions for n in every
    )


def _graphs(attribute: Any) -> list[Any]:
    import onnx_ir

    if attribute.is_ref():
        return []
    if attribute.type == onnx_ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == onnx_ir.AttributeType.GRAPHS else []


def random_names(model: Any) -> list[str]:
    """Operators of a model that may give something else on every run."""
    holders = [model.graph, *model.functions.values()]
    nodes = [n for holder in holders for n in holder.all_nodes()]
    own = set(model.functions)
    unknown = (n for n in nodes if n.domain not in KNOWN and n.op_identifier() not in own)
    return [n.op_type for n in nodes if is_random(n)] + [n.op_type for n in unknown]
