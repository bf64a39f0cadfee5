"""The layout ``"int4pack"``: codes of 4 bits as torch's own CPU kernel for bfloat16 wants them.

``codes`` are uint8 ``(N, K / 2)`` in an order that depends on the machine's vector registers, and
``scales`` are bfloat16 ``(G, N, 2)``, scale and ``-zero * scale`` of each group. bfloat16 scales
cost an error of up to 2**-9 of a number. The size is that of the plain layout, or less.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from graphopt.kernels.quantized import scales as scaling
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight

GROUPS = (32, 64, 128, 256)
_ROWS = 16
"""The kernel wants N to be a multiple of it."""
_BLOCK = 64
"""Rows that are laid out together, at the most, on any machine."""
_AT_ONCE = 1 << 21
"""Numbers that are laid out at once: they take five bytes each meanwhile."""


def refusal(scheme: Scheme, outputs: int, device: str) -> str | None:
    """Why a weight cannot have this layout, or None."""
    if device != "cpu":
        return "int4pack is a layout of the CPU"
    if scheme.dtype != "int" or scheme.bits != 4 or scheme.group_size not in GROUPS:
        return f"int4pack has int of 4 bits in groups of {', '.join(map(str, GROUPS))}"
    if outputs % _ROWS:
        return f"int4pack has a multiple of {_ROWS} output channels, not {outputs}"
    return None


def prepare(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of this layout; raises ValueError where the weight cannot have it."""
    reason = refusal(weight.scheme, weight.shape[0], weight.codes.device.type)
    if reason is not None:
        raise ValueError(f"{reason}: keep layout 'plain'")
    step = max(_BLOCK, _AT_ONCE // weight.width // _BLOCK * _BLOCK)
    starts = range(0, weight.shape[0], step)
    pieces = [_codes(weight.select(slice(start, start + step))) for start in starts]
    scales = scaling.load(weight.scales, weight.scheme, None, torch.float32)
    zeros = torch.zeros_like(scales) if weight.zeros is None else -weight.zeros * scales
    pairs = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous().to(torch.bfloat16)
    return {"codes": torch.cat(pieces), "scales": pairs}


def _codes(weight: QuantizedWeight) -> Tensor:
    return _packed(weight.unpacked().to(torch.int32) + weight.scheme.offset)


def _packed(unsigned: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)


def restorable(outputs: int) -> bool:
    """Whether `unpack` and `rows` can find the codes again: rows lie in whole blocks."""
    return outputs % _BLOCK == 0


@cache
def places(width: int) -> tuple[Tensor, Tensor]:
    """Where the kernel's order has the code of row r and input k of a block: byte and shift.

    Both are ``(64, K)``, int32 and uint8. Found by packing, bit by bit, the numbers of all codes.
    """
    count = _BLOCK * width
    numbers = torch.arange(count, dtype=torch.int32).view(_BLOCK, width)
    halves = torch.zeros(2, count // 2, dtype=torch.int64)
    for bit in range((count - 1).bit_length()):
        packed = _packed(numbers >> bit & 1).flatten()
        halves[0] |= (packed & 15).to(torch.int64) << bit
        halves[1] |= (packed >> 4).to(torch.int64) << bit
    bytes_, shifts = torch.empty(count, dtype=torch.int32), torch.empty(count, dtype=torch.uint8)
    for half, shift in zip(halves, (0, 4), strict=True):
        bytes_[half] = torch.arange(count // 2, dtype=torch.int32)
        shifts[half] = shift
    return bytes_.view(_BLOCK, width), shifts.view(_BLOCK, width)


def unpack(codes: Tensor) -> Tensor:
    """The plain codes, uint8 ``(N, K / 2)``, of those in this order; N as `restorable` has it."""
    width = codes.shape[1] * 2
    pieces = codes.view(-1, _BLOCK * codes.shape[1])
    where, shifts = (table.flatten() for table in places(width))
    made = torch.empty_like(codes)
    for piece, block in zip(pieces, made.split(_BLOCK), strict=True):
        found = piece[where] >> shifts & 15
        block.copy_(found[::2].view(_BLOCK, -1) | found[1::2].view(_BLOCK, -1) << 4)
    return made


def rows(
    indices: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    where: Tensor,
    shifts: Tensor,
) -> Tensor:
    """Rows of the weight, float32 ``(*indices.shape, K)``, from codes in this order.

    Args:
        scales: plain ones, ``(N, G)``, as zeros are.
        where: with ``shifts``, what `places` gives for K.
    """
    width = where.shape[1]
    flat = indices.flatten()
    lane, block = flat % _BLOCK, flat // _BLOCK
    start = (block * (_BLOCK * codes.shape[1]))[:, None]
    found = codes.view(-1)[start + where[lane]] >> shifts[lane] & 15
    numbers = found.unflatten(1, (scales.shape[1], -1)).to(torch.float32) - 8
    if zeros is not None:
        numbers = numbers - zeros[flat].to(torch.float32)[..., None]
    made = numbers * scales[flat].to(torch.float32)[..., None]
    return made.reshape(*indices.shape, width)


def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x (..., K)`` in any floating dtype, rounded to bfloat16, times the weight: ``(..., N)``."""
    given = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    group = x.shape[-1] // scales.shape[0]
    made = torch.ops.aten._weight_int4pack_mm_for_cpu(given, codes, group, scales).to(x.dtype)
    made = made.reshape(*x.shape[:-1], codes.shape[0])
    return made if bias is None else (made + bias).to(x.dtype)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers ``(N, K)``, bfloat16: products with unit vectors, whatever order codes are in."""
    return linear(torch.eye(codes.shape[1] * 2, dtype=torch.bfloat16), codes, scales).t()
