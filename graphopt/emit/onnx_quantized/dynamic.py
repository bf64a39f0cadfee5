"""Products of integers: activations rounded to 8 bits as the model runs, rows of weights to int8.

ONNX Runtime multiplies uint8 by int8 fast on x86, and int8 by int8 a number at a time (ten times as
long), so activations get the zero point 128. Without VNNI its products of uint8 and int8 add pairs
in 16 bits, which saturates; the session option ``session.x64quantprecision`` = 1 avoids that.

A scale for each row is what the torch path has. ONNX Runtime's own ``DynamicQuantizeMatMul`` has
one for the whole tensor: less work, about twice the error or more, and a result for one row that
depends on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from graphopt.emit.onnx_quantized.calls import Call
from graphopt.emit.onnx_quantized.emitter import Emitter
from graphopt.emit.onnx_quantized.form import Form, Product
from graphopt.emit.onnx_quantized.integers import Integers
from graphopt.emit.onnx_quantized.nbits import without_zeros
from graphopt.kernels.quantized import packing

_MIDDLE = 128


def products(call: Call, found: Integers) -> Iterator[Form]:
    """Forms of a product with a scale for each output channel; none for groups."""
    if found.scales.shape[1] != 1 or call.scheme.dtype != "int":
        return
    kept: dict[str, Any] = {"rounds": True}
    fused = "MatMulIntegerToFloat by rows"
    yield Form(fused, partial(_by_rows, found, _quantize_rows, _fused), **kept)
    yield Form(f"{fused}, divided", partial(_by_rows, found, _divide_rows, _fused), **kept)
    standard = "MatMulInteger by rows"
    yield Form(
        standard, partial(_by_rows, found, _divide_rows, _standard), standard=True, tier=1, **kept
    )
    yield Form(
        "DynamicQuantizeMatMul",
        partial(_whole, found),
        biased=found.zeros is None,
        shares=True,
        opset=13,
        **kept,
    )


def _whole(found: Integers, emit: Emitter, given: Product) -> Any:
    made = emit.own(
        "DynamicQuantizeMatMul",
        given.x,
        signed_codes(emit, given.call, found),
        channel_scales(emit, given.call, found),
        None,
        given.bias if found.zeros is None else None,
    )
    return made if found.zeros is None else without_zeros(emit, given, found, made)


def _by_rows(
    found: Integers,
    quantize: Callable[[Emitter, Product, Any], Any],
    multiply: Callable[[Emitter, Call, Integers, Any], Any],
    emit: Emitter,
    given: Product,
) -> Any:
    """``a * (s * (q @ codes.T))`` with ``a = max|x| / 127`` of a row and ``q = round(x / a)``."""
    scale = row_scales(emit, given.x, 127.0)
    part = multiply(emit, given.call, found, quantize(emit, given, scale))
    made = emit("Mul", part, scale)
    return made if found.zeros is None else without_zeros(emit, given, found, made)


def row_scales(emit: Emitter, x: Any, top: float) -> Any:
    """``max|x| / top`` of each row, ``(..., 1)``. ONNX Runtime's maximum passes over NaN."""
    last = emit.numbers(-1)
    high = emit("ReduceMax", x, last, keepdims=1)
    low = emit("Neg", emit("ReduceMin", x, last, keepdims=1))
    most = emit("Div", emit("Max", high, low), emit.number(f"top_{top:.0f}", top))
    return emit("Max", most, emit.number("tiny", torch.finfo(torch.float32).tiny))


def _divide_rows(emit: Emitter, given: Product, scale: Any) -> Any:
    scaled = emit("Div", given.x, scale)
    return emit("QuantizeLinear", scaled, emit.number("one", 1.0), _middle(emit))


def _quantize_rows(emit: Emitter, given: Product, scale: Any) -> Any:
    """Rows as the channels of ``QuantizeLinear``: no copy of the input in float32."""
    flat = emit("Reshape", given.x, emit.numbers(-1, given.call.weight.width))
    scales = emit("Reshape", scale, emit.numbers(-1))
    many = emit("Expand", emit.constant("graphopt.middles", _middles()), emit("Shape", scales))
    made = emit("QuantizeLinear", flat, scales, many, axis=0)
    return emit("Reshape", made, emit("Shape", given.x))


def _middles() -> torch.Tensor:
    return torch.tensor([_MIDDLE], dtype=torch.uint8)


def _middle(emit: Emitter) -> Any:
    return emit.number("middle", _MIDDLE, torch.uint8)


def _fused(emit: Emitter, call: Call, found: Integers, q: Any) -> Any:
    codes, scales = signed_codes(emit, call, found), channel_scales(emit, call, found)
    one = emit.number("one", 1.0)
    return emit.own("MatMulIntegerToFloat", q, codes, one, scales, _middle(emit))


def _standard(emit: Emitter, call: Call, found: Integers, q: Any) -> Any:
    sums = emit("MatMulInteger", q, signed_codes(emit, call, found), _middle(emit))
    return emit("Mul", emit("Cast", sums, to=1), channel_scales(emit, call, found))  # to float32


def channel_scales(emit: Emitter, call: Call, found: Integers) -> Any:
    return emit.constant(f"{call.name}.channel_scales", found.scales[:, 0])


def signed_codes(emit: Emitter, call: Call, found: Integers) -> Any:
    """Codes ``(K, N)``, int8; of fewer bits they are stored packed, and looked up on loading."""
    signed = found.codes.to(torch.int16) - found.middle
    if found.bits == 8:
        return emit.constant(f"{call.name}.codes", signed.t().to(torch.int8))
    per_byte = 8 // found.bits
    columns = found.codes.t()
    padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % per_byte))
    packed = emit.constant(f"{call.name}.packed", packing.pack(padded, found.bits))
    every = packing.unpack(torch.arange(256).to(torch.uint8)[:, None], found.bits, per_byte)
    table = (every.to(torch.int16) - found.middle).to(torch.int8)
    places = emit("Cast", packed, to=6)  # to int32
    looked_up = emit("Gather", emit.constant(f"graphopt.codes_{found.bits}", table), places, axis=0)
    flat = emit("Reshape", looked_up, emit.numbers(columns.shape[0], padded.shape[1]))
    if padded.shape[1] == columns.shape[1]:
        return flat
    return emit("Slice", flat, emit.numbers(0), emit.numbers(columns.shape[1]), emit.numbers(1))
