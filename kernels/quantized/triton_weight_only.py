# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: ARG001, N803, N806, RET505 - constants are capital, branches constant
"""``y = x W^T + bias`` with a packed weight W ``(N, K)`` that is dequantized in the main loop.

Frantar et al. 2024, "MARLIN: Mixed-Precision Auto-Regressive Parallel Inference on Large Language
Models", has the bounds and the way codes become numbers (`triton_unpack`).

FLOPs: ``2 M N K``. Bytes: ``N K bits / 8`` of codes and ``2 N K / group`` of scales, read once
where ``M <= BLOCK_M``; x and y are small beside them. Bound: for few rows the bandwidth. N = 28672,
K = 4096 in 4 bits and groups of 128 is 60.6 MB: 18.1 us at 3.35 TB/s (H100), 12.6 us at 4.8 TB/s
(H200), where bfloat16 has 235 MB, 70 and 49 us. Instructions come close to it: at 4 for a code, 16
us of an H100. From about ``M = 150 * bits / 8`` on the bound is the matrix rate (989 TFLOP/s), and
a weight that is dequantized before gets nearer to it: `triton_launch.dequantized`.

Where tiles of the result are fewer than what fills a GPU, K is cut into ``spans``; their parts are
added by `add_spans`, in one order: the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt.kernels.quantized import triton_configs as configs
from graphopt.kernels.quantized.triton_scales import load_scales, spread_scales
from graphopt.kernels.quantized.triton_unpack import tile

_WIDENED = tl.constexpr(configs.INTERPRETED)
"""The interpreter takes bfloat16 for integers: there, products are made in float32."""


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a b^T`` in float32, b in the dtype of a."""
    if _WIDENED:
        return tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), total, input_precision="ieee")
    else:
        return tl.dot(a, tl.trans(b.to(a.dtype)), total, input_precision=PRECISION)


@triton.autotune(
    configs.WEIGHT_ONLY,
    key=["outputs", "inputs", "bucket", "GROUP", "KIND"],
    prune_configs_by={"early_config_prune": configs.fitting},
)
@triton.jit(do_not_specialize=["count", "bucket", "spans"])
def weight_only(
    x,
    codes,
    scales,
    zeros,
    outer,
    table,
    bias,
    out,
    count,
    bucket,
    outputs,
    inputs,
    row_words,
    groups,
    x_row,
    spans,
    BITS: tl.constexpr,
    FORMAT: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of one span of the product: ``out (spans, M, N)``.

    Scales multiply sums of products, ``scale_g (sum x code - zero_g sum x)``, where a step lies in
    one group and rows are few; else codes, before the product.
    """
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, outputs - 1).to(tl.int64)
    x_at = x + tl.minimum(m, count - 1)[:, None] * x_row
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(inputs, BLOCK_K), spans) * BLOCK_K
    first = tl.program_id(2) * share
    BARE: tl.constexpr = GROUP == 0 and zeros is None
    AFTER: tl.constexpr = GROUP % BLOCK_K == 0 and BLOCK_M < 128
    for start in range(first, tl.minimum(first + share, inputs), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(x_at + k[None, :], mask=(k < inputs)[None, :], other=0.0)
        numbers = tile(codes, row, row_words, start, table, BITS, FORMAT, KIND, BLOCK_N, BLOCK_K)
        if BARE:
            total = _dot(left, numbers, total, PRECISION)
        elif AFTER:
            at = row * groups + (start // GROUP if GROUP != 0 else 0)
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            part = _dot(left, numbers, part, PRECISION)
            if zeros is not None:
                zero = tl.load(zeros + at).to(tl.float32)
                part -= tl.sum(left.to(tl.float32), 1)[:, None] * zero[None, :]
            total += part * load_scales(scales + at, None, outer, FORMAT)[None, :]
        else:
            scale, zero = spread_scales(
                scales, zeros, outer, row, groups, start, inputs, FORMAT, GROUP, BLOCK_N, BLOCK_K
            )
            real = (numbers.to(tl.float32) - zero) * scale
            total = _dot(left, real, total, PRECISION)
    if BARE:
        total *= load_scales(scales + row, None, outer, FORMAT)[None, :]
    if bias is not None:
        total += tl.load(bias + row).to(tl.float32)[None, :]
    real = (m < count)[:, None] & (n < outputs)[None, :]
    at = (tl.program_id(2).to(tl.int64) * count + m[:, None]) * outputs + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["spans"])
def add_spans(parts, bias, out, spans, size, outputs, BLOCK: tl.constexpr):
    """``out (M, N) = sum of parts (spans, M, N) + bias``; moves each once, which is the bound."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    part = parts + at
    for _ in range(spans):
        total += tl.load(part, mask=inside, other=0.0)
        part += size
    if bias is not None:
        total += tl.load(bias + at % outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
