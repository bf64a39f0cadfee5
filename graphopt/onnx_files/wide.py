"""An ONNX model in float64: what both files are held to, where ONNX Runtime can run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graphopt.errors import VerificationError
from graphopt.onnx_files.document import onnx_proto, session_of, stored_bytes
from graphopt.onnx_files.values import Feed, run

LIMIT = 1 << 29
"""Bytes of weights above which no copy in float64 is made."""

LIMIT_BY_DEFINITION = 1 << 29
"""The same in float64, for onnx's reference implementation: it is slow."""

_LONG = frozenset({"ConvTranspose", "Loop", "Scan", "LSTM", "GRU", "RNN", "LpPool", "Resize"})
"""What the reference implementation takes minutes for."""

_QUANTIZING = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearMatMul"),
        *("QLinearConv", "MatMulInteger", "ConvInteger"),
    }
)


def widened(model: Any) -> tuple[Callable[[Feed], list[Any]] | None, str]:
    """A function that runs the model in float64, or why there is none.

    Weights, constants and casts to floats become float64, and so do inputs; integers stay.
    """
    if stored_bytes(model) > LIMIT:
        return None, f"the weights take more than {LIMIT >> 20} MiB"
    if found := next((n for n in model.graph.all_nodes() if _is_bound(n)), None):
        return None, f"{found.op_type} computes in the types it has"
    wide = _wide(model)
    try:
        session = session_of(wide)
    except VerificationError as error:
        return _by_definition(wide, str(error.what)[:200])
    return lambda feed: run(session, {n: _wide_array(v) for n, v in feed.items()}), ""


def _by_definition(wide: Any, lacking: str) -> tuple[Callable[[Feed], list[Any]] | None, str]:
    """By onnx's reference implementation, where ONNX Runtime lacks an operator in float64."""
    from onnx.reference import ReferenceEvaluator

    from graphopt.onnx_files.definitions import OPERATORS

    nodes = [n for n in wide.graph.all_nodes() if n.op_type in _LONG]
    if nodes or stored_bytes(wide) > LIMIT_BY_DEFINITION:
        return None, lacking
    try:
        evaluator = ReferenceEvaluator(onnx_proto(wide), new_ops=OPERATORS)
    except Exception as error:  # of operators that it does not know
        return None, f"{lacking}; onnx: {' '.join(str(error).split())[:100]}"
    return lambda feed: list(evaluator.run(None, {n: _wide_array(v) for n, v in feed.items()})), ""


def _is_bound(node: Any) -> bool:
    return node.op_type in _QUANTIZING or node.domain == "com.microsoft"


def _wide(model: Any) -> Any:
    """A copy in float64, types of values between inputs and outputs left out."""
    twin = model.clone()
    twin.metadata_props.clear()
    for graph in twin.graphs():
        for value in graph.initializers.values():
            _widen_initializer(value)
        for value in (*graph.inputs, *graph.outputs):
            value.type = _wide_type(value.type)
    holders = [twin.graph, *twin.functions.values()]
    for node in [n for holder in holders for n in holder.all_nodes()]:
        _widen_node(node)
    return twin


def _widen_initializer(value: Any) -> None:
    value.const_value = _wide_tensor(value.const_value)
    value.type = _wide_type(value.type)


def _widen_node(node: Any) -> None:
    import onnx_ir

    outer = {id(v) for v in node.graph.outputs} if node.graph is not None else set()
    for value in node.outputs:
        if id(value) not in outer:
            value.type = None
            value.shape = None
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == onnx_ir.AttributeType.TENSOR:
            node.attributes[name] = onnx_ir.AttrTensor(name, _wide_tensor(attribute.as_tensor()))
        elif node.op_type == "Constant" and name in ("value_float", "value_floats"):
            del node.attributes[name]
            numbers = onnx_ir.tensor(np.array(attribute.value, np.float64))
            node.attributes["value"] = onnx_ir.AttrTensor("value", numbers)
        elif name in ("to", "dtype") and attribute.type == onnx_ir.AttributeType.INT:
            kind = _wide_kind(onnx_ir.DataType(attribute.as_int()))
            node.attributes[name] = onnx_ir.AttrInt64(name, int(kind))


def _wide_kind(kind: Any) -> Any:
    import onnx_ir

    narrow = (onnx_ir.DataType.FLOAT, onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)
    return onnx_ir.DataType.DOUBLE if kind in narrow else kind


def _wide_type(kind: Any) -> Any:
    import onnx_ir

    if isinstance(kind, onnx_ir.TensorType):
        return onnx_ir.TensorType(_wide_kind(kind.dtype))
    if isinstance(kind, onnx_ir.SequenceType):
        return onnx_ir.SequenceType(_wide_type(kind.elem_type))
    return (
        onnx_ir.OptionalType(_wide_type(kind.elem_type))
        if isinstance(kind, onnx_ir.OptionalType)
        else kind
    )


def _wide_tensor(tensor: Any) -> Any:
    import onnx_ir

    if tensor is None or _wide_kind(tensor.dtype) == tensor.dtype:
        return tensor
    return onnx_ir.tensor(tensor.numpy().astype(np.float64), name=tensor.name)


def _wide_array(value: Any) -> Any:
    if isinstance(value, list):
        return [_wide_array(v) for v in value]
    narrow = isinstance(value, np.ndarray) and value.dtype.name in (
        "float32",
        "float16",
        "bfloat16",
    )
    return value.astype(np.float64) if narrow else value
