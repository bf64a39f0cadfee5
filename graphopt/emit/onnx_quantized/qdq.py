"""The standard's quantize and dequantize, around products that runtimes then fuse.

Weights are ``(K, N)``: of ``DequantizeLinear`` and the product ONNX Runtime then makes
`MatMulNBits`, with activations rounded to 8 bits. ``(N, K)`` and a transposition it leaves as they
are, and decodes the weight on every call (12 ms instead of 0.3 for one row, K = 1024, N = 4096).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.emit.onnx_quantized.calls import Call
from graphopt.emit.onnx_quantized.emitter import Emitter
from graphopt.emit.onnx_quantized.form import Form, Product
from graphopt.emit.onnx_quantized.integers import Integers
from graphopt.emit.onnx_quantized.nbits import without_zeros
from graphopt.kernels.quantized import packing


def products(call: Call, found: Integers) -> Iterator[Form]:
    """A product of dequantized numbers: of weights, and of activations where they are static."""
    if call.scheme.dtype == "int":
        yield Form(
            "DequantizeLinear",
            partial(_dequantized, found),
            standard=True,
            rounds=True,  # by ONNX Runtime, of its own accord
            tier=2 if call.static is None else 0,
            opset=21 if found.bits < 8 or found.scales.shape[1] > 1 else 18,
        )


def _dequantized(found: Integers, emit: Emitter, given: Product) -> Any:
    """Quantized and dequantized again, as runtimes other than ONNX Runtime read it too."""
    call = given.call
    signed = (found.codes.to(torch.int16) - found.middle).t().contiguous()
    if found.bits == 8:
        codes = emit.constant(f"{call.name}.codes", signed.to(torch.int8))
    else:
        codes = _four_bits(emit, call, signed)
    grouped = found.scales.shape[1] > 1
    layout: dict[str, Any] = {"axis": 0, "block_size": found.group} if grouped else {"axis": 1}
    held = found.scales.t() if grouped else found.scales[:, 0]
    weight = emit("DequantizeLinear", codes, emit.constant(f"{call.name}.columns", held), **layout)
    if call.static is not None:
        given = given._replace(x=rounded(emit, given).numbers(emit))
    made = emit("MatMul", given.x, weight)
    return made if found.zeros is None else without_zeros(emit, given, found, made)


def _four_bits(emit: Emitter, call: Call, signed: Tensor) -> Any:
    """An INT4 initializer ``(K, N)``; the standard packs the whole, not row by row."""
    flat = (signed & 15).to(torch.uint8).reshape(1, -1)
    packed = packing.pack(flat, 4).flatten()
    return emit.constant(f"{call.name}.int4", packed, "INT4", tuple(signed.shape))


class Rounded(NamedTuple):
    """Activations as uint8 codes, and the constants by which they are read."""

    codes: Any
    scale: Any
    zero: Any

    def numbers(self, emit: Emitter) -> Any:
        """What the codes stand for."""
        return emit("DequantizeLinear", *self)


def rounded(emit: Emitter, given: Product) -> Rounded:
    """Activations quantized by what is known ahead of time; products that read the same name the
    constants by their values, so that runtimes see that they are the same."""
    static = given.call.static
    assert static is not None
    scale = emit.number(f"input_scale_{static.scale!r}", static.scale)
    zero = emit.number(f"input_zero_{static.zero}", static.zero, torch.uint8)
    return Rounded(emit("QuantizeLinear", given.x, scale, zero), scale, zero)
