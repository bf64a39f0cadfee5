# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ARG001, N803, N806, RET505 - constants are capital, branches constant
"""Products with activations that are quantized row by row: of 8 bits, as W8A8, W4A8 and so on.

``q = round(x / a)`` with ``a = max|x| / 127`` of each row (448 for E4M3), and then
``y = a * sum_g scale_g (q_g codes_g^T - zero_g sum q_g) + bias`` over groups g of K (Yao et al.
2022, "ZeroQuant", section 4.1; E4M3: Micikevicius et al. 2022, "FP8 Formats for Deep Learning").
Products of integers are exact in int32, within a group; the rest is float32.

For few rows the bytes of the weight, ``N K bits / 8``, are the bound; for many it is the matrix
rate, 1979 TOP/s of an H100 or H200 for int8 and for E4M3, with ``2 M N K`` operations: 104 us for
M = 4096, N = 6144, K = 4096.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt.kernels.quantized import triton_configs as configs
from graphopt.kernels.quantized.triton_unpack import tile


@triton.jit
def quantize_rows(x, q, scales, inputs, x_row, FLOAT: tl.constexpr, BLOCK: tl.constexpr):
    """Codes ``q (M, K)`` and scales ``(M,)`` of ``x (M, K)``, the same bits as the definition's.

    One program a row: 2 or 4 bytes a number read (twice, the second time from L1 or L2), 1 written;
    bound by the bandwidth: M = K = 4096 in bfloat16 moves 50 MB, 15 us at 3.35 TB/s. A row that
    holds NaN gets an infinite scale, so that what follows is not finite.
    """
    row = tl.program_id(0).to(tl.int64)
    TOP: tl.constexpr = 448.0 if FLOAT else 127.0
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, inputs, BLOCK):
        k = start + tl.arange(0, BLOCK)
        v = tl.abs(tl.load(x + row * x_row + k, mask=k < inputs, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(v == v, v, float("inf")))
    scale = tl.maximum(tl.div_rn(tl.max(largest, 0), TOP), 1.1754943508222875e-38)
    tl.store(scales + row, scale)
    for start in range(0, inputs, BLOCK):
        k = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_row + k, mask=k < inputs, other=0.0).to(tl.float32)
        v = tl.div_rn(v, tl.full((BLOCK,), 1.0, tl.float32) * scale)
        v = tl.where(v == v, tl.clamp(v, -TOP, TOP), 0.0)
        if FLOAT:
            exponent = (v.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            step = tl.maximum(exponent, 0.015625) * 0.125  # of E4M3 numbers; 2**-9 for the smallest
            code = _nearest(v, step).to(tl.float8e4nv)
        else:
            code = _nearest(v, 1.0).to(tl.int8)
        tl.store(q + row * inputs + k, code, mask=k < inputs)


@triton.jit
def quantize_static(x, q, scales, inputs, x_row, scale, zero, BLOCK: tl.constexpr):
    """Codes ``q (M, K)`` less 128 of ``x (M, K)``, by one scale and a zero point of signed codes;
    scales ``(M,)`` are it, and NaN for rows that hold NaN or infinity.

    One program a row, as `quantize_rows`, but each number is read once.
    """
    row = tl.program_id(0).to(tl.int64)
    odd = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, inputs, BLOCK):
        k = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_row + k, mask=k < inputs, other=0.0).to(tl.float32)
        odd += v * 0.0
        v = tl.div_rn(v, tl.full((BLOCK,), 1.0, tl.float32) * scale)
        v = tl.where(v == v, tl.clamp(v, -512.0, 512.0), 0.0)
        code = tl.clamp(_nearest(v, 1.0) + zero, -128.0, 127.0).to(tl.int8)
        tl.store(q + row * inputs + k, code, mask=k < inputs)
    tl.store(scales + row, tl.sum(odd, 0) + scale)


@triton.jit
def _nearest(v, step):
    """The nearest multiple of a power of two, even ones at ties: sums from ``2**23`` on have no
    fractions. (Conversions to E4M3 round one way under the interpreter, another on a GPU.)
    """
    whole = step * 12582912.0
    return (v + whole) - whole


@triton.jit
def _codes(
    codes,
    row,
    row_words,
    start,
    inputs,
    BITS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes of a tile: as they lie where they have 8 bits, else unpacked."""
    if BITS == 8:
        k = start + tl.arange(0, BLOCK_K)[None, :]
        return tl.load(codes + row[:, None] * inputs + k, mask=k < inputs, other=0.0)
    else:
        return tile(codes, row, row_words, start, None, BITS, FORMAT, "int8", BLOCK_N, BLOCK_K)


@triton.autotune(
    configs.DYNAMIC,
    key=["outputs", "inputs", "bucket", "GROUP", "FORMAT"],
    prune_configs_by={"early_config_prune": configs.fitting_groups},
)
@triton.jit(do_not_specialize=["count", "bucket", "spans"])
def dynamic(
    q,
    q_scales,
    codes,
    scales,
    zeros,
    bias,
    out,
    count,
    bucket,
    outputs,
    inputs,
    row_words,
    groups,
    spans,
    BITS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of one span of the product: ``out (spans, M, N)``.

    Hopper's tensor cores keep 14 bits of sums of E4M3 products; every 128 they are added in float32
    (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.3.2).
    """
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, outputs - 1).to(tl.int64)
    line = tl.minimum(m, count - 1)
    KIND: tl.constexpr = tl.float32 if FORMAT == "fp8" else tl.int32
    APART: tl.constexpr = BLOCK_K if BLOCK_K < 128 else 128
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32 if GROUP != 0 else KIND)
    summed = tl.zeros((BLOCK_M,), dtype=tl.int32)
    share = tl.cdiv(tl.cdiv(inputs, BLOCK_K), spans) * BLOCK_K
    first = tl.program_id(2) * share
    for start in range(first, tl.minimum(first + share, inputs), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(
            q + line[:, None] * inputs + k[None, :], mask=(k < inputs)[None, :], other=0.0
        )
        right = _codes(codes, row, row_words, start, inputs, BITS, FORMAT, BLOCK_N, BLOCK_K)
        if GROUP == 0:
            total = tl.dot(
                left, tl.trans(right), total, max_num_imprecise_acc=APART, out_dtype=KIND
            )
            if zeros is not None:
                summed += tl.sum(left.to(tl.int32), 1)
        else:
            at = row * groups + start // GROUP
            part = tl.dot(left, tl.trans(right), out_dtype=KIND).to(tl.float32)
            if zeros is not None:
                zero = tl.load(zeros + at).to(tl.float32)
                part -= tl.sum(left.to(tl.int32), 1).to(tl.float32)[:, None] * zero[None, :]
            total += part * tl.load(scales + at).to(tl.float32)[None, :]
    made = total.to(tl.float32)
    if GROUP == 0:
        if zeros is not None:
            zero = tl.load(zeros + row).to(tl.float32)
            made -= summed.to(tl.float32)[:, None] * zero[None, :]
        made *= tl.load(scales + row).to(tl.float32)[None, :]
    made *= tl.load(q_scales + line)[:, None]
    if bias is not None:
        made += tl.load(bias + row).to(tl.float32)[None, :]
    real = (m < count)[:, None] & (n < outputs)[None, :]
    at_out = (tl.program_id(2).to(tl.int64) * count + m[:, None]) * outputs + n[None, :]
    tl.store(out + at_out, made.to(out.dtype.element_ty), mask=real)


@triton.jit
def rescale(products, q_scales, scales, bias, out, size, outputs, BLOCK: tl.constexpr):
    """``out (M, N) = products q_scale scale + bias`` of int32 products; moves each once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    made = tl.load(products + at, mask=inside, other=0).to(tl.float32)
    column = at % outputs
    made *= tl.load(scales + column, mask=inside, other=0.0).to(tl.float32)
    made *= tl.load(q_scales + at // outputs, mask=inside, other=0.0)
    if bias is not None:
        made += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, made.to(out.dtype.element_ty), mask=inside)
