"""Which inputs and outputs of an ONNX operator may be in half precision, by its schema."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

_MADE_OF_ATTRIBUTES = frozenset(
    {
        *("Bernoulli", "ConstantOfShape", "EyeLike", "Multinomial", "RandomNormal"),
        *("RandomNormalLike", "RandomUniform", "RandomUniformLike", "SequenceEmpty"),
        *("DequantizeLinear", "QuantizeLinear"),  # codes mean what they do by scales as they are
    }
)


class Halves(NamedTuple):
    """Positions of a node's inputs and outputs of float32 that can be in half precision."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def halves_of(node: Any, opsets: dict[str, int], half: Any) -> Halves | None:
    """What of an ``onnx_ir`` node can be of dtype ``half``; None where it has to stay float32.

    Nodes with bodies stay float32, and those whose results are made of attributes or scales.
    """
    import onnx_ir

    if node.op_type in _MADE_OF_ATTRIBUTES or _has_bodies(node):
        return None
    schema = _schema(node.domain, node.op_type, opsets.get(node.domain, 1))
    if schema is None:
        return None
    kind = f"tensor({half.name.lower()})"
    allowed = {c.type_param_str: kind in c.allowed_type_strs for c in schema.type_constraints}

    def fitting(values: Any, formals: Any) -> frozenset[int]:
        floats = (
            i for i, v in enumerate(values) if v is not None and v.dtype == onnx_ir.DataType.FLOAT
        )
        return frozenset(i for i in floats if allowed.get(_variable(formals, i), False))

    found = Halves(fitting(node.inputs, schema.inputs), fitting(node.outputs, schema.outputs))
    return found if any(found) else None


def fill_types(model: Any) -> None:
    """Give values that have no type the one of the input that shares their type variable."""
    import onnx_ir

    for node in model.graph.all_nodes():
        schema = _schema(node.domain, node.op_type, model.opset_imports.get(node.domain, 1))
        for index, value in enumerate(node.outputs):
            if value.type is not None or schema is None:
                continue
            variable = _variable(schema.outputs, index)
            like = (
                v.dtype
                for i, v in enumerate(node.inputs)
                if v is not None and v.dtype and _variable(schema.inputs, i) == variable
            )
            fixed = {
                "tensor(int64)": onnx_ir.DataType.INT64,
                "tensor(float)": onnx_ir.DataType.FLOAT,
            }
            if (dtype := next(like, fixed.get(variable))) is not None:
                value.type = onnx_ir.TensorType(dtype)


def _has_bodies(node: Any) -> bool:
    import onnx_ir

    bodies = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)
    return any(attribute.type in bodies for attribute in node.attributes.values())


def _variable(formals: Any, index: int) -> str:
    """The type variable of a parameter; the last one may take several values."""
    if not formals:
        return ""
    formal = formals[min(index, len(formals) - 1)]
    return str(getattr(formal, "type_str", "") or getattr(formal, "typeStr", ""))


@cache
def _schema(domain: str, operator: str, version: int) -> Any | None:
    """onnx's schema, or that of ONNX Runtime for its own operators."""
    from onnx import defs

    try:
        return defs.get_schema(operator, version, domain)
    except defs.SchemaError:
        found = [s for s in _of_runtime().get((domain, operator), ()) if s.since_version <= version]
        return max(found, key=lambda s: int(s.since_version), default=None)


@cache
def _of_runtime() -> dict[tuple[str, str], list[Any]]:
    known: dict[tuple[str, str], list[Any]] = {}
    if find_spec("onnxruntime"):
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

        for schema in get_all_operator_schema():
            known.setdefault((schema.domain, schema.name), []).append(schema)
    return known
