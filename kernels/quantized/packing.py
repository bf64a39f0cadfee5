"""Codes of less than a byte, packed along a row, lowest bits first.

Code k of a row takes the bits ``[k * bits, (k + 1) * bits)`` of the row, counted from the lowest
bit of its first byte: two codes of 4 bits have the first in the low half of the byte, and eight
codes of 3 bits share three bytes. A row ends at a byte; what is left of it is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Numbers that are worked on at once: they and what is made of them stay in a core's cache."""


def row_chunks(rows: int, width: int, numbers: int = CHUNK) -> Iterator[slice]:
    """Slices of rows that hold about ``numbers`` numbers each, one row at the least."""
    step = max(1, numbers // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes ``(N, K)`` below ``2 ** bits``, uint8, as bytes ``(N, ceil(K * bits / 8))``."""
    rows, width = codes.shape
    packed = codes.new_empty((rows, -(-width * bits // 8)), dtype=torch.uint8)
    for chunk in row_chunks(rows, width):
        packed[chunk] = _pack(codes[chunk], bits, packed.shape[1])
    return packed


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The codes ``(N, K)``, uint8, of bytes ``(N, ceil(K * bits / 8))``; K is ``width``."""
    rows = packed.shape[0]
    codes = packed.new_empty((rows, width))
    for chunk in row_chunks(rows, width):
        codes[chunk] = _unpack(packed[chunk], bits, width)
    return codes


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """Codes and bytes of the shortest run that ends at a byte, and what holds its bits."""
    codes = 8 // gcd(bits, 8)
    size = codes * bits // 8
    return codes, size, torch.uint8 if size == 1 else torch.int32


def _pack(codes: Tensor, bits: int, stored: int) -> Tensor:
    per_word, size, kind = _word(bits)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    parts = padded.unflatten(1, (-1, per_word)).to(kind).unbind(-1)
    word = parts[0]
    for place, part in enumerate(parts[1:], 1):
        word = word | part << bits * place
    if size == 1:
        return word
    split = [word >> 8 * place & 255 for place in range(size)]
    return torch.stack(split, -1).to(torch.uint8).flatten(1)[:, :stored]


def _unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    per_word, size, kind = _word(bits)
    if size == 1:
        word = packed
    else:
        padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % size))
        parts = padded.unflatten(1, (-1, size)).to(kind).unbind(-1)
        word = parts[0]
        for place, part in enumerate(parts[1:], 1):
            word = word | part << 8 * place
    mask = (1 << bits) - 1
    split = [(word >> bits * place & mask).to(torch.uint8) for place in range(per_word)]
    return torch.stack(split, -1).flatten(1)[:, :width]
