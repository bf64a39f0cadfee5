"""Blocks of integers: ``MatMulNBits`` and ``GatherBlockQuantized`` of ONNX Runtime.

Both read the same bytes, so what a tied head shares is stored once. Zero points of theirs are
codes; ONNX Runtime takes others for 4 bits alone, and dequantizes the weight on every call then
(12 ms instead of 0.2 for one row, K = 1024, N = 4096). Their share of the product is a product of
sums over groups, ``sum_g (sum_k x_gk) * zero_g * scale_g``, which is small.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from graphopt.emit.onnx_quantized.calls import Call
from graphopt.emit.onnx_quantized.emitter import Emitter
from graphopt.emit.onnx_quantized.form import Form, Product
from graphopt.emit.onnx_quantized.integers import (
    Integers,
    block_sizes,
    doubled,
    in_blocks,
    pairs,
    per_block,
    whole_blocks,
)
from graphopt.kernels.quantized import packing

INT8, FLOAT = 4, 1
"""Accuracy levels: activations rounded to 8 bits block by block, or left as they are."""


def products(call: Call, found: Integers) -> Iterator[Form]:
    """Forms of a product, those first that are fast for one row."""
    sizes = block_sizes(found)
    chosen = whole_blocks(found)  # rows may be read by the same bytes: see `rows`
    if not call.tied and found.group == call.weight.width:
        chosen = [sizes[0], 32] if sizes[0] > 32 and len(sizes) > 2 else sizes
    for level in (INT8, FLOAT):
        for block in chosen:
            yield Form(
                f"MatMulNBits({found.bits} bits, blocks of {block}, accuracy {level})",
                partial(_product, found, block, level),
                biased=_has_bias(found),
                rounds=level == INT8,
                # without 4 bits it dequantizes the whole weight on every call
                tier=0 if level == INT8 or found.bits == 4 else 1,
                opset=13,
            )


def _has_bias(found: Integers) -> bool:
    return found.integer_zeros


def _product(found: Integers, block: int, level: int, emit: Emitter, given: Product) -> Any:
    call = given.call
    made = emit.own(
        "MatMulNBits",
        given.x,
        blocks(emit, call, found, block),
        _scales(emit, call, found, block),
        _zeros(emit, call, found, block),
        None,
        given.bias if _has_bias(found) else None,
        K=call.weight.width,
        N=call.weight.shape[0],
        bits=found.bits,
        block_size=block,
        accuracy_level=level,
    )
    return made if found.integer_zeros else without_zeros(emit, given, found, made)


def blocks(emit: Emitter, call: Call, found: Integers, block: int) -> Any:
    """Codes ``(N, blocks, bytes)``; E2M1 ones are stored in 4 bits and looked up on loading."""
    if call.scheme.dtype == "int":
        return emit.constant(f"{call.name}.blocks_{block}", in_blocks(found, block))
    rows, width = call.weight.shape
    count = -(-width // block)
    stored = call.weight.codes
    missing = count * block // 2 - stored.shape[1]
    padded = torch.nn.functional.pad(stored, (0, missing))
    held = emit.constant(f"{call.name}.{f'bytes_{block}' if missing else 'bytes'}", padded)
    places = emit("Cast", held, to=6)  # to int32
    table = emit.constant("graphopt.e2m1_doubled", pairs(doubled()))
    looked_up = emit("Gather", table, places, axis=0)
    return emit("Reshape", looked_up, emit.numbers(rows, count, block))


def _scales(emit: Emitter, call: Call, found: Integers, block: int) -> Any:
    values = per_block(found.scales, call.weight.width, block)
    return emit.constant(f"{call.name}.scales_{block}", values)


def _zeros(emit: Emitter, call: Call, found: Integers, block: int) -> Any:
    """Zero points as codes, packed as codes are; None where they are the middle, or no codes."""
    if found.zeros is None or not found.integer_zeros:
        return None
    plain = per_block(found.zeros + found.middle, call.weight.width, block).to(torch.uint8)
    packed = plain if found.bits == 8 else packing.pack(plain, found.bits)
    return emit.constant(f"{call.name}.zeros_{block}", packed)


def without_zeros(emit: Emitter, given: Product, found: Integers, made: Any) -> Any:
    """What zero points take from a product of codes."""
    assert found.zeros is not None
    groups = found.scales.shape[1]
    sizes = emit.numbers(*[0] * (given.rank - 1), groups, found.group)
    sums = emit("ReduceSum", emit("Reshape", given.x, sizes), emit.numbers(-1), keepdims=0)
    share = emit.constant(f"{given.call.name}.zero_shares", (-found.zeros * found.scales).t())
    return emit("Add", made, emit("MatMul", sums, share))


def rows(call: Call, found: Integers) -> Iterator[Form]:
    """`GatherBlockQuantized`, on the blocks that a product on the same weight reads."""
    for block in whole_blocks(found):
        if call.scheme.dtype == "int":
            yield Form(
                f"GatherBlockQuantized({found.bits} bits, blocks of {block})",
                partial(_rows, found, block),
            )


def _rows(found: Integers, block: int, emit: Emitter, given: Product) -> Any:
    """Blocks are rows of their own in its eyes: ``(N, blocks, block)``, one scale each."""
    call = given.call
    count, width = -(-call.weight.width // block), call.weight.width
    values = per_block(found.scales, width, block)[..., None]
    zeros = None
    if found.zeros is not None and found.integer_zeros:
        plain = per_block(found.zeros + found.middle, width, block)[..., None].to(torch.uint8)
        zeros = emit.constant(f"{call.name}.row_zeros_{block}", plain)
    made = emit.own(
        "GatherBlockQuantized",
        blocks(emit, call, found, block),
        given.x,
        emit.constant(f"{call.name}.row_scales_{block}", values),
        zeros,
        gather_axis=0,
        quantize_axis=2,
        block_size=block,
        bits=found.bits,
    )
    if found.zeros is not None and not found.integer_zeros:
        share = per_block(found.zeros * found.scales, width, block)[..., None]
        held = emit.constant(f"{call.name}.row_shares_{block}", share)
        made = emit("Sub", made, emit("Gather", held, given.x, axis=0))
    flat = emit("Reshape", made, emit.numbers(*[0] * given.rank, count * block))
    if count * block == width:
        return flat
    return emit("Slice", flat, emit.numbers(0), emit.numbers(width), emit.numbers(-1))
