"""Blocks of GGUF files as quantized weights: which types of ggml a `Scheme` holds, and how.

A row of K numbers is K / 32 or K / 256 blocks of bytes (ggml, ``ggml-common.h``); codes, scales and
minima stand in a block in an order of its own, and a number is ``code * scale - minimum``. Types
without minima are held exactly: Q4_0, Q8_0, Q5_0 (in 6 bits), Q3_K, Q6_K. Those with minima have
zero points ``minimum / scale``, in float32: Q4_1, Q5_1, Q2_K, Q4_K, Q5_K (5 bits again in 6).
Scales of K types are products of two stored numbers, which float32 holds exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.interchange.layout import held_bits
from graphopt.kernels.quantized import QuantizedWeight, Scheme
from graphopt.kernels.quantized.packing import row_chunks


class Blocks(NamedTuple):
    """What stands in blocks ``(n, bytes)``.

    Attributes:
        codes: ``(n, numbers)``, uint8, from 0.
        scales: ``(n, groups)``, float16 or float32.
        minima: ``(n, groups)``, float32, or None.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None


class BlockType(NamedTuple):
    """A type of ggml: numbers and bytes of a block, bits and middle of codes, size of groups."""

    numbers: int
    bytes: int
    bits: int
    group: int
    read: Callable[[Tensor], Blocks]
    middle: int | None = None
    """The code that stands for 0; None where there are minima."""


def weight_of(kind: str, rows: Tensor) -> QuantizedWeight:
    """The weight of rows of blocks, uint8 ``(N, bytes)``, of a type in `TYPES`.

    Raises:
        ValueError: rows are no whole number of blocks, or scales are NaN or infinity.
    """
    found = TYPES[kind]
    if rows.shape[1] % found.bytes:
        raise ValueError(f"rows of {rows.shape[1]} bytes hold no whole blocks of {kind}")
    width = rows.shape[1] // found.bytes * found.numbers
    scheme = Scheme(held_bits(found.bits), "int", found.group, found.middle is not None)
    parts = [_read(found, scheme, rows[chunk]) for chunk in row_chunks(rows.shape[0], width)]
    parts = parts or [_read(found, scheme, rows)]
    tensors = [None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)]
    codes, scales, zeros = tensors
    assert codes is not None and scales is not None
    if not scales.isfinite().all() or (zeros is not None and not zeros.isfinite().all()):
        raise ValueError("its scales hold NaN or infinity")
    return QuantizedWeight(scheme, width, codes, scales, zeros)


def _read(found: BlockType, scheme: Scheme, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Stored codes, scales and zeros of some rows."""
    blocks = found.read(rows.reshape(-1, found.bytes))
    codes, scales, zeros = blocks.codes, blocks.scales, None
    if blocks.minima is not None:
        codes, scales, zeros = _with_zeros(found, blocks)
    middle = 0 if found.middle is None else found.middle
    signed = (codes.to(torch.int16) - (middle or 1 << found.bits - 1)).to(torch.int8)
    made = QuantizedWeight.from_codes(
        signed.reshape(len(rows), -1),
        scales.reshape(len(rows), -1),
        None if zeros is None else (zeros - (1 << found.bits - 1)).reshape(len(rows), -1),
        scheme,
    )
    return made.codes, made.scales, made.zeros


def _with_zeros(found: BlockType, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros from 0. A group whose scale is 0 is its minimum everywhere."""
    scales, minima = blocks.scales.to(torch.float32), blocks.minima
    assert minima is not None
    flat = scales == 0
    zeros = torch.where(flat, -1.0, minima / torch.where(flat, 1.0, scales))
    kept = ~flat.repeat_interleave(found.group, 1)
    return blocks.codes * kept, torch.where(flat, -minima, scales), zeros


def _halves(blocks: Tensor, *places: int) -> list[Tensor]:
    """The float16 numbers ``(n, 1)`` that start at bytes."""
    return [blocks[:, p : p + 2].contiguous().view(torch.float16) for p in places]


def _nibbles(packed: Tensor) -> Tensor:
    """Low halves of all bytes, then high halves."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _fifth(packed: Tensor) -> Tensor:
    """Bits ``(n, 32)`` of four bytes, where the fifth bit of a code is."""
    places = torch.arange(8, dtype=torch.uint8)
    return ((packed[..., None] >> places) & 1).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Blocks:
    return Blocks(_nibbles(blocks[:, 2:]), *_halves(blocks, 0))


def _q4_1(blocks: Tensor) -> Blocks:
    scale, low = _halves(blocks, 0, 2)
    return Blocks(_nibbles(blocks[:, 4:]), scale, -low.float())


def _q5_0(blocks: Tensor) -> Blocks:
    return Blocks(_nibbles(blocks[:, 6:]) | _fifth(blocks[:, 2:6]), *_halves(blocks, 0))


def _q5_1(blocks: Tensor) -> Blocks:
    scale, low = _halves(blocks, 0, 2)
    return Blocks(_nibbles(blocks[:, 8:]) | _fifth(blocks[:, 4:8]), scale, -low.float())


def _q8_0(blocks: Tensor) -> Blocks:
    return Blocks(blocks[:, 2:] ^ 0x80, *_halves(blocks, 0))


def _pairs(packed: Tensor) -> Tensor:
    """Two bits of each byte at a time: of bytes ``(n, 32 h)``, codes ``(n, 128 h)``."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    halves = packed.unflatten(1, (-1, 1, 32))
    return ((halves >> shifts) & 3).flatten(1)


def _q2_k(blocks: Tensor) -> Blocks:
    scales, codes = blocks[:, :16], _pairs(blocks[:, 16:80])
    outer, low = (half.float() for half in _halves(blocks, 80, 82))
    return Blocks(codes, outer * (scales & 15), low * (scales >> 4))


def _q3_k(blocks: Tensor) -> Blocks:
    places = torch.arange(8, dtype=torch.uint8)[:, None]
    third = ((blocks[:, None, :32] >> places) & 1).flatten(1) << 2
    packed = blocks[:, 96:108]
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), 1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    high = ((packed[:, None, 8:] >> shifts) & 3).flatten(1) << 4
    scales = (low | high).to(torch.float32) - 32
    (outer,) = _halves(blocks, 108)
    return Blocks(_pairs(blocks[:, 32:96]) | third, outer.float() * scales)


def _scales_of_k(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima, of 6 bits each, in 12 bytes."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (last & 15) | (first >> 6 << 4)), 1)
    minima = torch.cat((second & 63, (last >> 4) | (second >> 6 << 4)), 1)
    return scales.float(), minima.float()


def _of_k(blocks: Tensor, codes: Tensor) -> Blocks:
    outer, low = (half.float() for half in _halves(blocks, 0, 2))
    scales, minima = _scales_of_k(blocks[:, 4:16])
    return Blocks(codes, outer * scales, low * minima)


def _chunked_nibbles(packed: Tensor) -> Tensor:
    """Of 32 bytes at a time the low halves, then the high ones."""
    return _nibbles(packed.unflatten(1, (-1, 32))).flatten(1)


def _q4_k(blocks: Tensor) -> Blocks:
    return _of_k(blocks, _chunked_nibbles(blocks[:, 16:]))


def _q5_k(blocks: Tensor) -> Blocks:
    places = torch.arange(8, dtype=torch.uint8)[:, None]
    fifth = ((blocks[:, None, 16:48] >> places) & 1).flatten(1) << 4
    return _of_k(blocks, _chunked_nibbles(blocks[:, 48:]) | fifth)


def _q6_k(blocks: Tensor) -> Blocks:
    low = blocks[:, :128].unflatten(1, (2, 64))
    codes = _nibbles(low).flatten(1) | _pairs(blocks[:, 128:192]) << 4
    scales = blocks[:, 192:208].view(torch.int8).float()
    (outer,) = _halves(blocks, 208)
    return Blocks(codes, outer.float() * scales)


TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(32, 18, 4, 32, _q4_0, 8),
    "Q4_1": BlockType(32, 20, 4, 32, _q4_1),
    "Q5_0": BlockType(32, 22, 5, 32, _q5_0, 16),
    "Q5_1": BlockType(32, 24, 5, 32, _q5_1),
    "Q8_0": BlockType(32, 34, 8, 32, _q8_0, 128),
    "Q2_K": BlockType(256, 84, 2, 16, _q2_k),
    "Q3_K": BlockType(256, 110, 3, 16, _q3_k, 4),
    "Q4_K": BlockType(256, 144, 4, 32, _q4_k),
    "Q5_K": BlockType(256, 176, 5, 32, _q5_k),
    "Q6_K": BlockType(256, 210, 6, 16, _q6_k, 32),
}
"""Types that are held as they are stored; others are dequantized."""
