"""Values that ONNX Runtime takes and gives: arrays of any type, sequences, maps, nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Feed = Mapping[str, Any]
"""Inputs by name."""

_CODES = {"bfloat16": 16, "float8e4m3fn": 17, "float8e4m3fnuz": 18, "float8e5m2": 19,
          "float8e5m2fnuz": 20, "uint4": 21, "int4": 22}  # fmt: skip
"""``TensorProto.DataType`` of types that numpy has not, by ONNX Runtime's names."""


def as_arrays(feed: Mapping[str, Any]) -> dict[str, Any]:
    """The same with arrays for tensors; bfloat16 and float8 as ``ml_dtypes``."""
    return {name: _array(value) for name, value in feed.items()}


def _array(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    plain = value.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        import ml_dtypes

        return plain.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return plain.numpy()


def run(session: Any, feed: Feed) -> list[Any]:
    """Outputs of a session, in order.

    Types that numpy has not are passed as their bytes; such models take and give tensors alone.
    """
    import onnxruntime

    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = 4  # what goes wrong is raised
    names = [entry.name for entry in session.get_inputs()]
    names += [e.name for e in session.get_overridable_initializers() if e.name in feed]
    declared = [*session.get_inputs(), *session.get_outputs()]
    if not any(_code(entry.type) for entry in declared):
        return list(session.run(None, {n: feed.get(n) for n in names}, quiet))
    kinds = {entry.name: entry.type for entry in session.get_inputs()}
    given = {n: _held(feed[n], kinds.get(n, "")) for n in names}
    return [_read(value) for value in session.run_with_ort_values(None, given, quiet)]


def _code(kind: str) -> int | None:
    return _CODES.get(kind.removeprefix("tensor(").removesuffix(")"))


def _held(array: Any, kind: str) -> Any:
    from onnxruntime import OrtValue

    code = _code(kind)
    if code is None:
        return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    plain = np.ascontiguousarray(array)
    plain = plain.view(np.uint16 if plain.dtype.itemsize == 2 else np.uint8)
    return OrtValue.ortvalue_from_numpy_with_onnx_type(plain, code)


def _read(value: Any) -> Any:
    code = _code(value.data_type()) if value.is_tensor() else None
    if code is None:
        return value.numpy()
    import onnx_ir

    dtype = onnx_ir.DataType(code)
    size = value.tensor_size_in_bytes()
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    if dtype.bitwidth < 8:
        return np.frombuffer(raw, np.uint8)  # codes, two in a byte
    return np.frombuffer(raw, dtype.numpy()).reshape(value.shape())


def flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Arrays and other leaves of a value with a name for each; what it consists of is one too."""
    if isinstance(value, Mapping):
        keys = list(value)
        head: list[tuple[str, Any]] = [(f"{name} (keys)", keys)]
        return head + [row for k in keys for row in flat(value[k], f"{name}[{k!r}]")]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        rows: list[tuple[str, Any]] = [(f"{name} (length)", len(value))]
        return rows + [row for i, v in enumerate(value) for row in flat(v, f"{name}[{i}]")]
    return [(name, value)]


def as_tensor(array: Any) -> Tensor | None:
    """Floating-point and complex arrays as tensors; None for anything else, float8 included."""
    if not isinstance(array, np.ndarray):
        return None
    if array.dtype.name == "bfloat16":
        plain = np.ascontiguousarray(array).view(np.uint16)
        return torch.from_numpy(plain.copy()).view(torch.bfloat16)
    if array.dtype.kind in "fc" and array.dtype.isbuiltin == 1:
        return torch.from_numpy(np.ascontiguousarray(array))
    return None


def same(a: Any, b: Any) -> bool:
    """Whether two leaves are the same: type, shape and every bit."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return a.tolist() == b.tolist() if a.dtype.hasobject else a.tobytes() == b.tobytes()
    return type(a) is type(b) and bool(a == b)
