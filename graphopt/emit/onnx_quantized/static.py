"""Products of integers with static activations: one scale and one zero point, known ahead of time.

``QuantizeLinear`` gives uint8, which ONNX Runtime multiplies fast by int8 on x86. The same between
``DequantizeLinear`` is in `qdq`: there it is ONNX Runtime that makes products of integers of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from graphopt.emit.onnx_quantized.dynamic import channel_scales, signed_codes
from graphopt.emit.onnx_quantized.emitter import Emitter
from graphopt.emit.onnx_quantized.form import Form, Product
from graphopt.emit.onnx_quantized.integers import Integers
from graphopt.emit.onnx_quantized.nbits import without_zeros
from graphopt.emit.onnx_quantized.qdq import Rounded, rounded

Multiply = Callable[[Emitter, Product, Integers, Rounded], Any]


def products(found: Integers) -> Iterator[Form]:
    """Forms of a product with a scale for each output channel; none for groups."""
    if found.scales.shape[1] != 1:
        return
    fused: Multiply = _fused
    yield Form(
        "QuantizeLinear, MatMulIntegerToFloat",
        partial(_product, found, fused),
        biased=found.zeros is None,
        rounds=True,
    )
    yield Form(
        "QuantizeLinear, MatMulInteger",
        partial(_product, found, _standard),
        standard=True,
        rounds=True,
    )


def _product(found: Integers, multiply: Multiply, emit: Emitter, given: Product) -> Any:
    x = rounded(emit, given)
    made = multiply(emit, given, found, x)
    if found.zeros is None:
        return made
    return without_zeros(emit, given._replace(x=x.numbers(emit)), found, made)


def _fused(emit: Emitter, given: Product, found: Integers, x: Rounded) -> Any:
    return emit.own(
        "MatMulIntegerToFloat",
        x.codes,
        signed_codes(emit, given.call, found),
        x.scale,
        channel_scales(emit, given.call, found),
        x.zero,
        None,
        given.bias if found.zeros is None else None,
    )


def _standard(emit: Emitter, given: Product, found: Integers, x: Rounded) -> Any:
    call = given.call
    sums = emit("MatMulInteger", x.codes, signed_codes(emit, call, found), x.zero)
    assert call.static is not None
    scales = found.scales[:, 0].to(torch.float64) * call.static.scale
    held = emit.constant(f"{call.name}.product_scales", scales.to(torch.float32))
    return emit("Mul", emit("Cast", sums, to=1), held)  # to float32
