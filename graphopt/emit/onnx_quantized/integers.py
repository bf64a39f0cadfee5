"""Stored weights as the integers that ONNX Runtime's operators take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.quantized import QuantizedWeight, packing, scales, tables

_HELD = {2: 2, 3: 4, 4: 4, 6: 8, 8: 8}
"""Bits that hold a code of so many: 3 and 6 have no packing in ONNX."""


class Integers(NamedTuple):
    """A weight ``(N, K)`` in G groups: ``(code - middle - zero) * scale``.

    Attributes:
        bits: of a code: 2, 4 or 8.
        codes: uint8 ``(N, K)``; ``middle`` stands for zero.
        scales: float32 ``(N, G)``.
        zeros: float32 ``(N, G)``, or None.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    @property
    def middle(self) -> int:
        return 1 << self.bits - 1

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def integer_zeros(self) -> bool:
        """Whether zero points are codes themselves (or there are none)."""
        if self.zeros is None:
            return True
        shifted = self.zeros + self.middle
        fits = (shifted >= 0) & (shifted < 1 << self.bits) & (shifted == shifted.round())
        return bool(fits.all())


def integers(weight: QuantizedWeight) -> Integers | None:
    """The weight as integers, exactly; ``None`` for numbers that are none (NF4, FP8).

    E2M1 numbers are halves of integers up to 12.
    """
    scheme = weight.scheme
    numbers = scales.load(weight.scales, scheme, weight.tensor_scale, torch.float32)
    if scheme.dtype == "int":
        bits = _HELD[scheme.bits]
        codes = weight.unpacked().to(torch.int16) + (1 << bits - 1)
        zeros = None if weight.zeros is None else weight.zeros.to(torch.float32)
        return Integers(bits, codes.to(torch.uint8), numbers, zeros)
    if scheme.dtype in ("nf4", "fp8"):
        return None
    return Integers(8, doubled()[weight.unpacked().int()], numbers / 2, None)


def doubled() -> Tensor:
    """E2M1 numbers times two, plus 128: uint8 ``(16,)``."""
    return (tables.table("fp4") * 2 + 128).to(torch.uint8)


def pairs(table: Tensor) -> Tensor:
    """What bytes of two 4-bit codes stand for, the low one first: ``(16,)`` to ``(256, 2)``."""
    every = torch.arange(256)
    return torch.stack((table[every & 15], table[every >> 4]), 1)


def in_blocks(found: Integers, block: int) -> Tensor:
    """Codes as `MatMulNBits` has them: uint8 ``(N, blocks, block * bits / 8)``, lowest first.

    The last block is filled up with zeros.
    """
    rows, width = found.codes.shape
    blocks = -(-width // block)
    padded = torch.nn.functional.pad(
        found.codes, (0, blocks * block - width), value=float(found.middle)
    )
    packed = padded if found.bits == 8 else packing.pack(padded, found.bits)
    return packed.view(rows, blocks, -1)


def per_block(values: Tensor, width: int, block: int) -> Tensor:
    """Scales or zeros of groups ``(N, G)`` repeated for the blocks that groups are cut into."""
    blocks = -(-width // block)
    return values.repeat_interleave(blocks // values.shape[1], 1).contiguous()


def block_sizes(found: Integers) -> list[int]:
    """Block sizes of ONNX Runtime that cut groups, or whole rows, evenly; the largest first.

    They are powers of two from 16 to 256.
    """
    sizes = (256, 128, 64, 32, 16)
    width, group = found.codes.shape[1], found.group
    if group == width:
        return [s for s in sizes if s <= max(width, 16)]
    return [s for s in sizes if group % s == 0]


def whole_blocks(found: Integers) -> list[int]:
    """The largest block that leaves no codes over at the end of a row, or the largest there is.

    What is over takes bytes, and the numbers of a block that activations are rounded by are fewer.
    Empty where no block cuts groups evenly.
    """
    sizes, width = block_sizes(found), found.codes.shape[1]
    even = [s for s in sizes if width % s == 0] if found.group == width else []
    return (even or sizes)[:1]
