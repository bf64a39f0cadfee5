"""Weights decoded to floats: what every operator set has a form for.

Codes are looked up in a table and scaled. ONNX Runtime does that once, when it loads the file: the
file is small, and the weight in memory is float32. ``DequantizeLinear`` of float8 it does not fold,
but runs on every call (13 ms instead of 0.9 for one row, K = 1024, N = 4096).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphopt.emit.onnx_quantized.calls import Call
from graphopt.emit.onnx_quantized.dynamic import row_scales
from graphopt.emit.onnx_quantized.emitter import Emitter
from graphopt.emit.onnx_quantized.form import Form, Product
from graphopt.emit.onnx_quantized.integers import Integers, pairs
from graphopt.kernels.quantized import packing, scales, tables

_FLOAT8 = 17


def products(call: Call, found: Integers | None) -> Iterator[Form]:
    """Forms of a product by a decoded weight."""
    if call.activations == "dynamic" and call.scheme.dtype == "fp8":
        yield Form(
            "table decoded on loading, activations in float8",
            _float8,
            standard=True,
            rounds=True,
            unpacks=True,
            opset=19,
        )
        return
    if _fits_bnb4(call) and not call.tied:  # its bytes are no others
        yield Form("MatMulBnb4", _bnb4, opset=13)
    tier = 0 if found is None else 3
    told = "table decoded on loading"
    yield Form(told, _tabled, standard=True, unpacks=True, tier=tier, opset=13)


def _tabled(emit: Emitter, given: Product) -> Any:
    call = given.call
    rows, width = call.weight.shape
    made = _scaled(emit, call, _looked_up(emit, call, rows))
    flat = emit("Reshape", made, emit.numbers(rows, width))
    return emit("MatMul", given.x, emit("Transpose", flat, perm=[1, 0]))


def _looked_up(emit: Emitter, call: Call, rows: int, indices: Any = None, rank: int = 0) -> Any:
    """Numbers of rows before they are scaled: ``(rows, G, group)``, or of those at ``indices``."""
    stored, table = _bytes(call)
    codes = emit.constant(f"{call.name}.bytes", stored)
    codes = codes if indices is None else emit("Gather", codes, indices, axis=0)
    values = emit.constant(f"graphopt.{_table_name(call)}", table)
    made = emit("Gather", values, emit("Cast", codes, to=6), axis=0)  # to int32
    groups = call.weight.scales.shape[1]
    lead = [rows] if indices is None else [0] * rank
    width, held = call.weight.width, stored.shape[1] * table.shape[1]
    if held != width:
        flat = emit("Reshape", made, emit.numbers(*lead, held))
        made = emit("Slice", flat, emit.numbers(0), emit.numbers(width), emit.numbers(-1))
    return emit("Reshape", made, emit.numbers(*lead, groups, width // groups))


def _scaled(emit: Emitter, call: Call, made: Any, indices: Any = None) -> Any:
    def held(name: str, values: Tensor) -> Any:
        whole = emit.constant(f"{call.name}.{name}", values.to(torch.float32)[..., None])
        return whole if indices is None else emit("Gather", whole, indices, axis=0)

    weight = call.weight
    if weight.zeros is not None:
        made = emit("Sub", made, held("group_zeros", weight.zeros))
    numbers = scales.load(weight.scales, weight.scheme, weight.tensor_scale, torch.float32)
    return emit("Mul", made, held("group_scales", numbers))


def rows() -> Form:
    """Rows of a table, decoded as they are read."""
    return Form("rows of a table", _rows, standard=True)


def _rows(emit: Emitter, given: Product) -> Any:
    call = given.call
    made = _looked_up(emit, call, 0, given.x, given.rank)
    scaled = _scaled(emit, call, made, given.x)
    return emit("Reshape", scaled, emit.numbers(*[0] * given.rank, call.weight.width))


def _table_name(call: Call) -> str:
    scheme = call.scheme
    return f"int{scheme.bits}" if scheme.dtype == "int" else _kind(call)


def _kind(call: Call) -> str:
    dtype = call.scheme.dtype
    return dtype if dtype in ("nf4", "fp8") else "e2m1"


def _bytes(call: Call) -> tuple[Tensor, Tensor]:
    """Stored bytes ``(N, B)``, and the numbers ``(256, b)`` that each stands for."""
    weight, scheme = call.weight, call.scheme
    if scheme.dtype == "int":
        bits = 8 if scheme.bits == 6 else 4 if scheme.bits == 3 else scheme.bits
        if bits == 8:
            every = torch.arange(256).to(torch.uint8).view(torch.int8)
            return weight.unpacked().view(torch.uint8), every.to(torch.float32)[:, None]
        codes = (weight.unpacked() + (1 << bits - 1)).view(torch.uint8)
        every = packing.unpack(torch.arange(256).to(torch.uint8)[:, None], bits, 8 // bits)
        return packing.pack(codes, bits), every.to(torch.float32) - (1 << bits - 1)
    if scheme.dtype == "fp8":
        return weight.codes.view(torch.uint8), tables.table("fp8")[:, None]
    return weight.codes, pairs(tables.table(scheme.dtype if scheme.dtype == "nf4" else "fp4"))


def _fits_bnb4(call: Call) -> bool:
    group = call.scheme.group_size or call.weight.width
    is_block = group >= 16 and group & (group - 1) == 0
    return call.scheme.dtype == "nf4" and is_block and call.activations == "none"


def _bnb4(emit: Emitter, given: Product) -> Any:
    """It has the first of two codes in the high half of a byte, and decodes on every call."""
    call = given.call
    rows, width = call.weight.shape
    swapped = (call.weight.codes >> 4) | (call.weight.codes << 4)
    return emit.own(
        "MatMulBnb4",
        given.x,
        emit.constant(f"{call.name}.swapped", swapped.flatten()),
        emit.constant(f"{call.name}.flat_scales", call.weight.scales.to(torch.float32).flatten()),
        K=width,
        N=rows,
        block_size=call.scheme.group_size or width,
        quant_type=1,
        training_mode=0,
        transB=1,
    )


def _float8(emit: Emitter, given: Product) -> Any:
    """``a * (round(x / a) @ W.T)`` with ``a = max|x| / 448`` of a row, rounded to E4M3."""
    scale = row_scales(emit, given.x, 448.0)
    rounded = emit("Cast", emit("Div", given.x, scale), to=_FLOAT8)
    inner = given._replace(x=emit("Cast", rounded, to=1))
    return emit("Mul", _tabled(emit, inner), scale)
