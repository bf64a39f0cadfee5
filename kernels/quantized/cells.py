"""Numbers between the two codes that they may be rounded to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.quantized import codes as coding
from graphopt.kernels.quantized import scales as scaling
from graphopt.kernels.quantized import tables
from graphopt.kernels.quantized.refine import levels
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight

_OFF = 0.49
"""How far from its code, of the gap to the next, a number is that had another code nearer."""


class Grouped(NamedTuple):
    """A weight in groups, float32: scales and zeros ``(N, G, 1)``, the rest ``(N, G, group)``.

    Attributes:
        levels: what codes stand for at scale 1, zero points not taken off.
        scaled: the numbers at scale 1, zero points added. Numbers whose code is not the nearest
            one, as other methods than rounding choose them, are moved just so far that it is.
    """

    scales: Tensor
    zeros: Tensor | None
    levels: Tensor
    scaled: Tensor


def grouped(weight: Tensor, start: QuantizedWeight) -> Grouped:
    """A weight ``(N, K)`` beside a quantized form of it."""
    scheme, wide = start.scheme, torch.float32
    scales = scaling.load(start.scales, scheme, start.tensor_scale, wide)[..., None]
    zeros = None if start.zeros is None else start.zeros.to(wide)[..., None]
    shape = (start.scales.shape[1], -1)
    scaled = weight.detach().to(wide).unflatten(1, shape) / scales
    scaled = scaled if zeros is None else scaled + zeros
    held = levels(start.unpacked(), scheme).unflatten(1, shape)
    nearest = coding.levels(scaled.clone(), torch.ones_like(scales), None, scheme)
    if scheme.dtype != "int":
        nearest = tables.look_up(nearest, scheme.dtype)
    if not torch.equal(nearest, held):
        below, above = neighbours(scaled, held, scheme)
        next_ = torch.where(scaled < held, below, above)
        scaled = torch.where(nearest == held, scaled, held + _OFF * (next_ - held))
    return Grouped(scales, zeros, held, scaled)


def neighbours(scaled: Tensor, held: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The level that is held and the next one on the side of each number, the lower one first.

    At an end of the range, for numbers beyond, both are that end.
    """
    values = all_levels(scheme).to(scaled.device)
    place = torch.searchsorted(values, held, out_int32=True)
    up = (scaled >= held).int()
    above = (place + up).clamp_(max=len(values) - 1)
    below = (place - 1 + up).clamp_(min=0)
    return values[below], values[above]


def all_levels(scheme: Scheme) -> Tensor:
    """What codes stand for at scale 1, rising, float32."""
    if scheme.dtype == "int":
        first, last = scheme.limits
        return torch.arange(first, last + 1, dtype=torch.float32)
    values = tables.table(scheme.dtype)
    return values[values.isfinite()].unique()
