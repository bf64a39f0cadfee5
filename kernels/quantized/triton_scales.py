# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806, RET505, SIM108 - constants are capital, branches constant
"""Scales and zero points of a tile of a weight, and whole tiles of dequantized numbers."""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt.kernels.quantized.triton_unpack import tile


@triton.jit
def load_scales(at, mask, outer, FORMAT: tl.constexpr):
    """Scales as float32; those of MXFP4 are stored as their exponent, plus 127."""
    if mask is None:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=mask, other=0.0)
    if FORMAT == "mxfp4":
        exponent = found.to(tl.int32)
        return tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    elif FORMAT == "nvfp4":
        return found.to(tl.float32) * tl.load(outer)
    else:
        return found.to(tl.float32)


@triton.jit
def spread_scales(
    scales,
    zeros,
    outer,
    row,
    groups,
    start,
    inputs,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scales and zeros ``(BLOCK_N, BLOCK_K)``, or ``(BLOCK_N, 1)``; GROUP is 0 for whole rows.

    What lies in one group for sure, the largest power of two in its size, is loaded once.
    """
    SURE: tl.constexpr = GROUP & (-GROUP)
    STEP: tl.constexpr = SURE if GROUP != 0 and SURE < BLOCK_K else BLOCK_K
    k = start + STEP * tl.arange(0, BLOCK_K // STEP)[None, :]
    at = row[:, None] * groups + (k // GROUP if GROUP != 0 else k * 0)
    scale = _repeat(load_scales(scales + at, k < inputs, outer, FORMAT), STEP, BLOCK_N, BLOCK_K)
    if zeros is not None:
        zero = tl.load(zeros + at, mask=k < inputs, other=0.0).to(tl.float32)
        return scale, _repeat(zero, STEP, BLOCK_N, BLOCK_K)
    else:
        return scale, 0.0


@triton.jit
def _repeat(few, STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    if STEP == BLOCK_K:
        return few
    else:
        alike = few[:, :, None].broadcast_to((BLOCK_N, BLOCK_K // STEP, STEP))
        return alike.reshape(BLOCK_N, BLOCK_K)


@triton.jit
def dequantize(
    codes,
    scales,
    zeros,
    outer,
    table,
    rows,
    out,
    count,
    outputs,
    inputs,
    row_words,
    groups,
    BITS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``out (count, K)``: numbers of the rows that are listed, or of the first ``count`` ones.

    ``(code - zero) scale`` or ``table[code] scale``, computed in float32 as the definition does:
    the same bits. Rows that are not there give NaN. FLOPs: 2 a number. Bytes: ``bits / 8`` read and
    2 or 4 written for each number; the bandwidth is the bound: N = 28672, K = 4096 in 4 bits to
    bfloat16 moves 297 MB, 89 us at 3.35 TB/s.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(place, count - 1)
    if rows is not None:
        row = tl.load(rows + row).to(tl.int64)
    exists = (row >= 0) & (row < outputs)
    row = tl.where(exists, row, 0)
    start = tl.program_id(1) * BLOCK_K
    numbers = tile(codes, row, row_words, start, table, BITS, FORMAT, "fp32", BLOCK_N, BLOCK_K)
    scale, zero = spread_scales(
        scales, zeros, outer, row, groups, start, inputs, FORMAT, GROUP, BLOCK_N, BLOCK_K
    )
    real = (numbers.to(tl.float32) - zero) * scale
    k = start + tl.arange(0, BLOCK_K)
    real = tl.where(exists[:, None], real, float("nan"))
    inside = (place < count)[:, None] & (k < inputs)[None, :]
    tl.store(out + place[:, None] * inputs + k[None, :], real.to(out.dtype.element_ty), mask=inside)
