"""What an ONNX model says of itself: inputs, outputs, operators, versions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from graphopt.loading.facts import TensorFacts, ValueFacts
from graphopt.loading.onnx_files import tensor_bytes
from graphopt.onnx_types import dtype_name


def onnx_value(value: Any) -> ValueFacts:
    """A ``ValueInfoProto``; sizes without a number are texts, ``?`` where they have no name."""
    if not value.type.HasField("tensor_type"):
        return ValueFacts(value.name, value.type.WhichOneof("value") or "unknown", ())
    tensor = value.type.tensor_type
    shape = tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim
    )
    return ValueFacts(value.name, dtype_name(tensor.elem_type), shape)


def onnx_tensor(tensor: Any) -> TensorFacts:
    """A ``TensorProto``, wherever its data lies."""
    shape = tuple(tensor.dims)
    nbytes = tensor_bytes(tensor) if min(shape, default=0) >= 0 else None
    return TensorFacts(tensor.name, dtype_name(tensor.data_type), shape, nbytes)


def onnx_operators(model: Any) -> Iterator[str]:
    """The operator of every node, with its domain where it is not ONNX's own; in subgraphs too."""
    stack = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    while stack:
        node = stack.pop()
        yield f"{node.domain}::{node.op_type}" if node.domain else str(node.op_type)
        for attribute in node.attribute:
            graphs = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
            stack += [inner for graph in graphs for inner in graph.node]


def onnx_metadata(model: Any) -> dict[str, str]:
    """Versions, producer and the model's own texts."""
    opsets = ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import)
    facts = {"ir version": str(model.ir_version), "opsets": opsets}
    if model.producer_name:
        facts["producer"] = f"{model.producer_name} {model.producer_version}".strip()
    return facts | {entry.key: entry.value for entry in model.metadata_props}
