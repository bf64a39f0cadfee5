"""The layout ``"int4pack"``: codes of 4 bits as torch's own CPU kernel for bfloat16 wants them.

``codes`` are uint8 ``(N, K / 2)`` in an order that depends on the machine's vector registers, and
``scales`` are bfloat16 ``(G, N, 2)``, scale and ``-zero * scale`` of each group. bfloat16 scales
cost an error of up to 2**-9 of a number. The size is that of the plain layout, or less.
"""

from __future__ import annotations

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
    unsigned = weight.unpacked().to(torch.int32) + weight.scheme.offset
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)


def product(x: Tensor, tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """``x (M, K)``, bfloat16, times the weight: ``(M, N)``."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), tensors["codes"], scheme.group_size, tensors["scales"]
    )


def dequantize(tensors: dict[str, Tensor], scheme: Scheme, width: int) -> Tensor:
    """The numbers ``(N, K)``, bfloat16: products with unit vectors, whatever order codes are in."""
    return product(torch.eye(width, dtype=torch.bfloat16), tensors, scheme).t()
