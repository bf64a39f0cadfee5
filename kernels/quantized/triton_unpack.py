# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, N806, RET505 - constants are capital, branches constant
"""Packed codes as tiles of numbers, for the kernels: read once, as words of 32 bits.

The layout is `packing`'s, the plain one: a row of a weight lies along K, so that the words of a
tile's row are neighbours, read 16 bytes a thread in whole sectors; another layout would save the
tile's way through shared memory, not bytes. A word has 32 / bits codes; codes of 3 and 6 bits are
taken from 24 bits, which lie in a word or across two.

Integers below 8 bits become bfloat16 or float16 two at a time without a conversion: ``128 + code``
is the bits ``0x4300 | code`` of bfloat16, and ``1024 + code`` is ``0x6400 | code`` of float16 (Kim
et al. 2022, "Who Says Elephants Can't Run", section 3.3; Frantar et al. 2024, "MARLIN", section
3.4). What that adds, and the offset of packed codes, is then taken off, exactly, two at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphopt.kernels.quantized import triton_configs as configs

_WIDENED = tl.constexpr(configs.INTERPRETED)
"""The interpreter takes bfloat16 for integers: there, they become float32."""


@triton.jit
def tile(
    codes,
    row,
    row_words,
    start,
    table,
    BITS: tl.constexpr,
    FORMAT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes ``start ... start + BLOCK_K`` of rows ``row (BLOCK_N,)``, as numbers, in their order.

    Beyond the end of a row they are those of the code 0.
    """
    units = _units(codes, row, row_words, start, BITS, BLOCK_K)
    HALVES: tl.constexpr = FORMAT == "int" and BITS != 8 and (KIND == "bf16" or KIND == "fp16")
    MODE: tl.constexpr = KIND if HALVES or KIND == "int8" else FORMAT
    PLACES: tl.constexpr = BLOCK_K // units.shape[1] // (2 if HALVES else 1)
    if HALVES and (BITS == 3 or BITS == 6):
        units = (units & 0xFFF) | ((units & 0xFFF000) << 4)
    if PLACES == 2:
        made = _two(units, 0, 1, table, BITS, MODE)
    elif PLACES == 4:
        made = _four(units, 0, 1, table, BITS, MODE)
    elif PLACES == 8:
        made = _eight(units, 0, 1, table, BITS, MODE)
    else:
        made = _sixteen(units, table, BITS, MODE)
    return made.reshape(BLOCK_N, BLOCK_K)


@triton.jit
def _units(codes, row, row_words, start, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """What codes are taken from: uint32 with 32 bits of them, or 24 where they have 3 or 6."""
    first = codes + row[:, None] * row_words
    if BITS == 3 or BITS == 6:
        byte = start * BITS // 8 + 3 * tl.arange(0, BLOCK_K * BITS // 24)[None, :]
        at, shift = byte // 4, 8 * (byte % 4)
        low = tl.load(first + at, mask=at < row_words, other=0).to(tl.uint32, bitcast=True)
        high = tl.load(first + at + 1, mask=at + 1 < row_words, other=0).to(tl.uint32, bitcast=True)
        return ((low >> shift) | ((high << (31 - shift)) << 1)) & 0xFFFFFF
    else:
        at = start * BITS // 32 + tl.arange(0, BLOCK_K * BITS // 32)[None, :]
        return tl.load(first + at, mask=at < row_words, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _two(
    unit, place: tl.constexpr, step: tl.constexpr, table, BITS: tl.constexpr, MODE: tl.constexpr
):
    """Every ``step`` places of a unit, from one on: joining last makes neighbours."""
    return tl.join(
        _number(unit, place, table, BITS, MODE), _number(unit, place + step, table, BITS, MODE)
    )


@triton.jit
def _four(
    unit, place: tl.constexpr, step: tl.constexpr, table, BITS: tl.constexpr, MODE: tl.constexpr
):
    return tl.join(
        _two(unit, place, 2 * step, table, BITS, MODE),
        _two(unit, place + step, 2 * step, table, BITS, MODE),
    )


@triton.jit
def _eight(
    unit, place: tl.constexpr, step: tl.constexpr, table, BITS: tl.constexpr, MODE: tl.constexpr
):
    return tl.join(
        _four(unit, place, 2 * step, table, BITS, MODE),
        _four(unit, place + step, 2 * step, table, BITS, MODE),
    )


@triton.jit
def _sixteen(unit, table, BITS: tl.constexpr, MODE: tl.constexpr):
    return tl.join(_eight(unit, 0, 2, table, BITS, MODE), _eight(unit, 1, 2, table, BITS, MODE))


@triton.jit
def _number(unit, place: tl.constexpr, table, BITS: tl.constexpr, MODE: tl.constexpr):
    """The number at a place of each unit; those of both its halves, side by side, in 16 bits."""
    field = (unit >> (BITS * place)) & ((1 << BITS) - 1)
    if MODE == "bf16":
        return _halves(unit >> (BITS * place), 0x43004300, 128, tl.bfloat16, BITS)
    elif MODE == "fp16":
        return _halves(unit >> (BITS * place), 0x64006400, 1024, tl.float16, BITS)
    elif BITS == 8 and MODE != "fp8":
        return field.to(tl.uint8).to(tl.int8, bitcast=True)
    elif MODE == "int8":
        return field.to(tl.int8) - (1 << (BITS - 1))
    elif MODE == "int":
        return field.to(tl.float32) - (1 << (BITS - 1))
    elif MODE == "fp8":
        return field.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    elif MODE == "nf4":
        return tl.load(table + field)
    else:
        return _e2m1(field)


@triton.jit
def _halves(unit, BIT: tl.constexpr, ONE: tl.constexpr, NUMBER: tl.constexpr, BITS: tl.constexpr):
    """The lowest code of either half: one operation for both makes ``ONE + code``."""
    both = (unit & (((1 << BITS) - 1) * 0x10001)) | BIT
    low = both.to(tl.uint16).to(NUMBER, bitcast=True)
    found = tl.join(low, (both >> 16).to(tl.uint16).to(NUMBER, bitcast=True))
    if _WIDENED:
        found = found.to(tl.float32)
    return found - tl.full(found.shape, ONE + (1 << (BITS - 1)), found.dtype)


@triton.jit
def _e2m1(field):
    """From 1 on they are bits of a float32, two of exponent and one of mantissa; 0, 1/2 are not."""
    size = field & 7
    normal = ((size << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where(size < 2, size.to(tl.float32) * 0.5, normal)
    return tl.where(field > 7, -magnitude, magnitude)
