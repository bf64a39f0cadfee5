"""Types of tensors: ONNX's numbers for them, what ONNX Runtime calls them, dtypes of torch."""

from __future__ import annotations

import torch

NAMES = (
    *("float32", "uint8", "int8", "uint16", "int16", "int32", "int64", "string", "bool"),
    *("float16", "float64", "uint32", "uint64", "complex64", "complex128", "bfloat16"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "uint4", "int4"),
    *("float4_e2m1", "float8_e8m0", "uint2", "int2", "float6_e2m3", "float6_e3m2"),
)
"""By ``TensorProto.DataType`` (onnx.proto), from 1."""

_CODES = {name: code for code, name in enumerate(NAMES, 1)} | {"float8_e8m0fnu": 24}
_FOREIGN = _CODES["bfloat16"]
"""From this number on, numpy has no such types."""

_SPELLED = {"float32": "float", "float64": "double"}
RUNTIME = {f"tensor({_SPELLED.get(name, name.replace('_', ''))})": name for name in NAMES}
"""`NAMES` by what ONNX Runtime calls them."""


def dtype_name(code: int) -> str:
    """The name of a ``TensorProto.DataType``; ``type 99`` for one that is not known."""
    return NAMES[code - 1] if 0 < code <= len(NAMES) else f"type {code}"


def code_of(dtype: torch.dtype) -> int:
    """ONNX's number for a dtype.

    Raises:
        KeyError: ONNX has no such type.
    """
    return _CODES[_name(dtype)]


def numpy_name(dtype: torch.dtype) -> str | None:
    """What numpy calls a dtype that ONNX has; None where numpy has no such type."""
    return _name(dtype) if code_of(dtype) < _FOREIGN else None


def foreign_code(kind: str) -> int | None:
    """ONNX's number for a type of ONNX Runtime that numpy has not; None for any other."""
    code = _CODES.get(RUNTIME.get(kind, ""), 0)
    return code if code >= _FOREIGN else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
