"""Values that ONNX Runtime takes and gives: arrays of any type, sequences, maps, nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.onnx_types import foreign_code

Feed = Mapping[str, Any]
"""Inputs by name."""


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
    if not any(foreign_code(entry.type) for entry in declared):
        return list(session.run(None, {n: feed.get(n) for n in names}, quiet))
    kinds = {entry.name: entry.type for entry in session.get_inputs()}
    given = {n: _held(feed[n], kinds.get(n, "")) for n in names}
    return [_read(value) for value in session.run_with_ort_values(None, given, quiet)]


def _held(array: Any, kind: str) -> Any:
    """A value of ONNX Runtime; numbers of less than a byte are packed, the low one first."""
    from onnxruntime import OrtValue

    code = foreign_code(kind)
    if code is None:
        return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    made = OrtValue.ortvalue_from_shape_and_type(list(array.shape), code)
    raw = _packed(np.ascontiguousarray(array), _width(code))
    ctypes.memmove(made.data_ptr(), raw, len(raw))
    return made


def _read(value: Any) -> Any:
    code = foreign_code(value.data_type()) if value.is_tensor() else None
    if code is None:
        return value.numpy()
    import onnx_ir

    dtype, shape = onnx_ir.DataType(code).numpy(), tuple(value.shape())
    size = value.tensor_size_in_bytes()
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return _unpacked(raw, _width(code), shape, dtype)


def _width(code: int) -> int:
    import onnx_ir

    return int(onnx_ir.DataType(code).bitwidth)


def _packed(array: np.ndarray[Any, Any], bits: int) -> bytes:
    if bits >= 8:
        return array.tobytes()
    per_byte, mask = 8 // bits, (1 << bits) - 1
    codes = array.reshape(-1).view(np.uint8) & mask
    rows = np.pad(codes, (0, -codes.size % per_byte)).reshape(-1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    return bytes((rows << shifts).sum(1, dtype=np.uint8).tobytes())


def _unpacked(
    raw: bytes, bits: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> np.ndarray[Any, Any]:
    if bits >= 8:
        return np.frombuffer(raw, dtype).reshape(shape)
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    codes = (np.frombuffer(raw, np.uint8)[:, None] >> shifts) & ((1 << bits) - 1)
    codes = codes.reshape(-1)[: int(np.prod(shape, dtype=np.int64))].astype(np.uint8)
    # a cast takes what does not fit as its lowest bits: those of a negative number
    plain = codes.view(dtype) if np.dtype(dtype).name.startswith("float") else codes.astype(dtype)
    return plain.reshape(shape)


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
