# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803
"""The Triton kernels. Sizes ``N`` rows, ``V`` classes, ``D`` features; ``P = 2 N V D`` FLOPs.

Products are of tiles as they are stored, summed in float32 registers. Rows and columns beyond the
last repeat it, so that only features need a mask; what they give is never stored. Offsets are of
64 bits wherever rows or classes are multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt.kernels.cross_entropy import configs

_WIDENED = tl.constexpr(configs.INTERPRETED)
"""The interpreter takes bfloat16 for integers in a product; in float32 it is the same product."""


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a b`` in float32."""
    if _WIDENED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _logit_tile(
    hidden,
    weight,
    bias,
    rows,
    classes,
    features,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    softcap,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``z = c tanh(x / c)`` of ``x = hidden weight^T + bias``, ``(BLOCK_N, BLOCK_V)`` float32.

    Moves ``(BLOCK_N + BLOCK_V) D`` numbers for ``2 BLOCK_N BLOCK_V D`` FLOPs.
    """
    columns = tl.arange(0, BLOCK_D).to(tl.int64)
    a_at = hidden + rows[:, None] * hidden_row + columns[None, :] * hidden_column
    b_at = weight + classes[None, :] * weight_row + columns[:, None] * weight_column
    z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, features, BLOCK_D):
        inside = columns < features - start
        a = tl.load(a_at, mask=inside[None, :], other=0.0)
        b = tl.load(b_at, mask=inside[:, None], other=0.0)
        z = _dot(a, b, z, PRECISION)
        a_at += BLOCK_D * hidden_column
        b_at += BLOCK_D * weight_column
    if bias is not None:
        z += tl.load(bias + classes).to(tl.float32)[None, :]
    if softcap is not None:
        # tanh(y) = 2 sigmoid(2 y) - 1, off by one rounding of 1: 6e-8 of the cap.
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
    return z


@triton.autotune(
    configs.TILES, key=["features"], prune_configs_by={"early_config_prune": configs.fitting_tiles}
)
@triton.jit
def sweep(
    hidden,
    weight,
    bias,
    target,
    maximum,
    total,
    own,
    summed,
    spread,
    best,
    count,
    classes,
    features,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    softcap,
    spans,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Summaries of ``BLOCK_N`` rows over one of the spans of classes, to be merged.

    With ``m`` the largest logit so far (Milakov and Gimelshein 2018, algorithm 3, extended):
    ``total = sum exp(z - m)`` and ``spread = sum (z - m) exp(z - m)``, so that the log-sum-exp is
    ``m + log total`` and the entropy ``log total - spread / total``, free of what logits share.

    FLOPs: ``P``. Bytes: hidden and weight once where L2 holds what runs together (row blocks of
    one span are neighbours), and 12 to 28 a row and span. Bound: the matrix rate, since a tile
    has ``D`` multiply-adds per logit beside one exponential and about ten other operations.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(row, count - 1)
    wanted = tl.load(target + rows)
    m = tl.full((BLOCK_N,), -1e38, tl.float32)
    s = tl.zeros((BLOCK_N,), dtype=tl.float32)
    t = tl.zeros((BLOCK_N,), dtype=tl.float32)
    z_own = tl.zeros((BLOCK_N,), dtype=tl.float32)
    z_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    at = tl.zeros((BLOCK_N,), dtype=tl.int32)
    tiles = tl.cdiv(classes, BLOCK_V)
    share = tl.cdiv(tiles, spans)
    first = tl.program_id(1) * share
    for tile in range(first, tl.minimum(first + share, tiles)):
        column = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        exists = column < classes
        z = _logit_tile(
            hidden,
            weight,
            bias,
            rows,
            tl.minimum(column, classes - 1).to(tl.int64),
            features,
            hidden_row,
            hidden_column,
            weight_row,
            weight_column,
            softcap,
            PRECISION,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
        )
        z_own += tl.sum(tl.where(column[None, :] == wanted[:, None], z, 0.0), 1)
        if summed is not None:
            z_sum += tl.sum(tl.where(exists[None, :], z, 0.0), 1)
        z = tl.where(exists[None, :], z, float("-inf"))
        top = tl.max(z, 1)
        if best is not None:
            at = tl.where(top > m, tile * BLOCK_V + tl.argmax(z, 1), at)
        higher = tl.maximum(m, top)
        e = tl.exp(z - higher[:, None])
        scale = tl.exp(m - higher)
        if spread is not None:
            apart = tl.where(e > 0, z - higher[:, None], 0.0)
            t = scale * (t + (m - higher) * s) + tl.sum(apart * e, 1)
        s = scale * s + tl.sum(e, 1)
        m = higher
    place = tl.program_id(1).to(tl.int64) * count + row
    real = row < count
    tl.store(maximum + place, m, mask=real)
    tl.store(total + place, s, mask=real)
    tl.store(own + place, z_own, mask=real)
    if summed is not None:
        tl.store(summed + place, z_sum, mask=real)
    if spread is not None:
        tl.store(spread + place, t, mask=real)
    if best is not None:
        tl.store(best + place, at, mask=real)


@triton.autotune(
    configs.TILES,
    key=["features", "TILE"],
    prune_configs_by={"early_config_prune": configs.fitting_tiles},
)
@triton.jit
def slopes(
    hidden,
    weight,
    bias,
    target,
    order,
    lse,
    entropy,
    d_lse,
    d_target,
    d_sum,
    d_entropy,
    panel,
    bar,
    kept,
    count,
    classes,
    features,
    first,
    width,
    hidden_row,
    hidden_column,
    weight_row,
    weight_column,
    panel_row,
    softcap,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Slopes of a panel of ``width`` classes from ``first`` on: ``(N, width)`` of the panel.

    ``d_lse p + d_target [v = target] + d_sum - d_entropy p (log p + H)``, times ``1 - (z / c)^2``
    under a soft-cap, with ``p = exp(z - lse)``; the logits are computed again (Wijmans et al.
    2024, "Cut Your Losses in Large-Vocabulary Language Models", section 4.2).

    FLOPs: ``P width / V``. Bytes: hidden once and ``width D`` numbers of the weight, if L2 holds
    them, and ``N width`` numbers written. Bound: the matrix rate for ``D`` in the hundreds.

    Filtering (ibid., section 4.3), where ``kept`` is given: a tile with no slope above its row's
    ``bar`` is not stored but marked 0. ``order`` lists the classes as they lie in panels.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(row, count - 1)
    place = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    column = tl.minimum(first + place, classes - 1).to(tl.int64)
    if order is not None:
        column = tl.load(order + column)
    z = _logit_tile(
        hidden,
        weight,
        bias,
        rows,
        column,
        features,
        hidden_row,
        hidden_column,
        weight_row,
        weight_column,
        softcap,
        PRECISION,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
    )
    log_p = z - tl.load(lse + rows)[:, None]
    p = tl.exp(log_p)
    slope = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if d_lse is not None:
        slope += tl.load(d_lse + rows)[:, None] * p
    if d_entropy is not None:
        inner = tl.where(p > 0, log_p + tl.load(entropy + rows)[:, None], 0.0)
        slope -= tl.load(d_entropy + rows)[:, None] * p * inner
    if d_sum is not None:
        slope += tl.load(d_sum + rows)[:, None]
    if d_target is not None:
        own = column[None, :] == tl.load(target + rows)[:, None]
        slope += tl.where(own, tl.load(d_target + rows)[:, None], 0.0)
    if softcap is not None:
        slope *= 1 - (z / softcap) * (z / softcap)
    stored = (row < count)[:, None] & (place < width)[None, :]
    at = panel + row[:, None] * panel_row + place[None, :]
    keep = 1
    if kept is not None:
        tl.static_assert(BLOCK_N == TILE and BLOCK_V == TILE)
        low = tl.abs(slope) <= tl.load(bar + rows)[:, None]  # false of NaN, which is kept
        keep = tl.max(tl.max(tl.where(low, 0, stored.to(tl.int32)), 1), 0)
        tl.store(kept + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), keep)
    if keep > 0:
        tl.store(at, slope.to(panel.dtype.element_ty), mask=stored)


@triton.jit
def _product(
    a,
    b,
    b_rows,
    out,
    out_rows,
    chosen,
    numbers,
    height,
    depth,
    columns,
    a_row,
    a_column,
    b_row,
    b_column,
    out_row,
    chosen_row,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``out (height, columns) = a (height, depth) b (depth, columns)``, or added to it.

    Of a panel of slopes ``S``: ``d_weight = S^T hidden``, whole rows in one launch, and
    ``d_hidden += S weight``, in float32. Each tile of ``out`` belongs to one program: no atomics,
    the same bits every time. ``b_rows`` and ``out_rows`` list rows of ``b`` and ``out`` where
    classes are sorted. Where tiles are filtered, ``chosen`` lists those that count along the depth
    for each ``TILE`` rows of ``a``, ``numbers`` how many they are: no branch in the loop.

    FLOPs: ``P width / V``. Bytes: ``a`` and ``b`` once if L2 holds what runs together, ``out``
    once. Added to, it is read and written in float32, ``8 N D`` bytes for ``2 N D width`` FLOPs:
    the matrix rate R is the bound, not the bandwidth B, from ``width = 4 R / B`` on (580 classes
    at 700 TFLOP/s and 4.8 TB/s).
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(place, height - 1)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    a_at = a + rows[:, None] * a_row
    blocks = tl.cdiv(depth, BLOCK_K)
    if chosen is not None:
        down = (tl.program_id(0) * BLOCK_M) // TILE
        blocks = tl.load(numbers + down) * (TILE // BLOCK_K)
        chosen += down * chosen_row
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for block in range(blocks):
        start = block * BLOCK_K
        if chosen is not None:
            start = tl.load(chosen + start // TILE) * TILE + start % TILE
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        exists = k < depth
        a_tile = tl.load(a_at + k[None, :] * a_column, mask=exists[None, :], other=0.0)
        if b_rows is not None:
            k = tl.load(b_rows + k, mask=exists, other=0)
        b_at = b + k[:, None] * b_row + column[None, :] * b_column
        b_tile = tl.load(b_at, mask=exists[:, None] & (column < columns)[None, :], other=0.0)
        total = _dot(a_tile, b_tile, total, PRECISION)
    line = rows
    if out_rows is not None:
        line = tl.load(out_rows + rows)
    at = out + line[:, None] * out_row + column[None, :]
    real = (place < height)[:, None] & (column < columns)[None, :]
    if ADD:
        total += tl.load(at, mask=real, other=0.0)
    tl.store(at, total.to(out.dtype.element_ty), mask=real)


_choice = {
    "configs": configs.PRODUCTS,
    "key": ["columns", "TILE"],
    "prune_configs_by": {"early_config_prune": configs.fitting_products},
}
assigned = triton.autotune(**_choice)(_product)
added = triton.autotune(**_choice, restore_value=["out"])(_product)
"""Apart, so that only the choice for sums copies ``out`` to restore it."""
