"""Numbers to codes and back, for groups of numbers with a scale and, maybe, a zero point.

Groups are float32 ``(..., group)``; scales and zeros are float32 and broadcast against them. A
code is what stands in ``QuantizedWeight.codes`` before it is packed: int8 for ``int``, whatever its
bits, float8_e4m3fn for ``fp8``, else uint8 that counts into a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.kernels.quantized import packing, tables
from graphopt.kernels.quantized.scheme import Scheme


def levels(groups: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """The nearest codes; those of ``int`` still as float32."""
    scaled = groups / scales
    if scheme.dtype == "int":
        shifted = scaled if zeros is None else scaled.add_(zeros)
        return shifted.round_().clamp_(*scheme.limits)
    if scheme.dtype == "fp8":
        return scaled.clamp_(-448, 448).to(torch.float8_e4m3fn)
    return tables.nearest(scaled, scheme.dtype)


def encode(groups: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """The nearest codes."""
    found = levels(groups, scales, zeros, scheme)
    return found.to(torch.int8) if scheme.dtype == "int" else found


def decode(codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """``(codes - zeros) * scales``, or ``table[codes] * scales``, in the dtype of scales."""
    if scheme.dtype != "int":
        return tables.look_up(codes, scheme.dtype).to(scales.dtype).mul_(scales)
    numbers = codes.to(scales.dtype)
    return numbers * scales if zeros is None else (numbers - zeros).mul_(scales)


def snap(groups: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """Each number as it will be read back."""
    return decode(levels(groups, scales, zeros, scheme), scales, zeros, scheme)


def store(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes ``(N, K)`` as they are kept: signed ones plus `Scheme.offset`, packed."""
    if not scheme.packed:
        return codes.contiguous()
    unsigned = (codes + scheme.offset).view(torch.uint8) if scheme.offset else codes
    return packing.pack(unsigned, scheme.bits)


def load(stored: Tensor, scheme: Scheme, width: int) -> Tensor:
    """The codes ``(N, K)`` of stored ones; K is ``width``."""
    if not scheme.packed:
        return stored
    unsigned = packing.unpack(stored, scheme.bits, width)
    return unsigned.view(torch.int8).sub_(scheme.offset) if scheme.offset else unsigned
