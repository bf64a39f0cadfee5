"""Codes packed in 32-bit words, as checkpoints hold them: lowest bits first.

Words are little-endian. Where codes follow each other without a gap, the bytes of the words are
those of `graphopt.kernels.quantized.packing`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from graphopt.kernels.quantized import packing


def words_of(count: int, bits: int) -> int:
    """Words that ``count`` codes take, packed without gaps."""
    return -(-count * bits // 32)


def spaced_words_of(count: int, bits: int) -> int:
    """Words that ``count`` codes take where none lies in two words."""
    return -(-count // (32 // bits))


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes ``(N, K)`` below ``2 ** bits``, uint8, as int32 ``(N, words)`` without gaps."""
    stored = packing.pack(codes, bits)
    return pad(stored, (0, -stored.shape[1] % 4)).contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes ``(N, count)``, uint8, of int32 words ``(N, W)``, packed with or without gaps.

    Codes with gaps are told by the number of words; where that is the same, so are the bits.
    """
    if words.shape[1] != words_of(count, bits):
        return _unpack_spaced(words, bits, count)
    stored = words.contiguous().view(torch.uint8)[:, : -(-count * bits // 8)]
    if bits in (5, 7):
        return _unpack_odd(stored, bits, count)
    return packing.unpack(stored, bits, count)


def _unpack_odd(stored: Tensor, bits: int, count: int) -> Tensor:
    """Codes of 5 or 7 bits, a bit at a time: eight of them are more than a word."""
    places = torch.arange(8, dtype=torch.uint8)
    made = stored.new_zeros((stored.shape[0], count))
    for chunk in packing.row_chunks(stored.shape[0], 8 * count):
        single = ((stored[chunk, :, None] >> places) & 1).flatten(1)[:, : count * bits]
        for place, bit in enumerate(single.unflatten(1, (count, bits)).unbind(-1)):
            made[chunk] |= bit << place
    return made


def _unpack_spaced(words: Tensor, bits: int, count: int) -> Tensor:
    mask = (1 << bits) - 1
    split = [(words >> bits * place & mask).to(torch.uint8) for place in range(32 // bits)]
    return torch.stack(split, -1).flatten(1)[:, :count].contiguous()
