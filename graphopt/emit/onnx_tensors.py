"""Which tensors of an ONNX model are the same, bit for bit: zeros of two signs are two."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def tensor_key(tensor: Any, *, turned: bool = False) -> tuple[Any, ...]:
    """Type, shape and a hash of the bits: alike for equal ones; of the transposed if ``turned``."""
    shape = tuple(tensor.shape)
    if tensor.dtype.name == "STRING":
        return (tensor.dtype, shape, tuple(tensor.string_data()))
    plain = bits_of(tensor).T if turned else None
    raw = tensor.tobytes() if plain is None else np.ascontiguousarray(plain).tobytes()
    return (tensor.dtype, shape[::-1] if turned else shape, hashlib.sha256(raw).digest())


def tensors_equal(a: Any, b: Any) -> bool:
    """Whether type, shape and every bit are the same."""
    if a.dtype != b.dtype or tuple(a.shape) != tuple(b.shape):
        return False
    if a.dtype.name == "STRING":
        return list(a.string_data()) == list(b.string_data())
    return a is b or bool(a.tobytes() == b.tobytes())


def bits_of(tensor: Any) -> np.ndarray[Any, Any]:
    """Values of whole bytes as unsigned integers: NaN and zeros of either sign as they are."""
    array = tensor.numpy()
    kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    return np.ascontiguousarray(array).view(kinds[array.dtype.itemsize])
