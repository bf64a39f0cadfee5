"""The range of numbers that the codes of a group are spread over.

A range is clipped where that lowers the squared error: large numbers are stored as the end of the
range, and all others finer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.kernels.quantized import codes as coding
from graphopt.kernels.quantized.scales import storable
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.tables import largest

Pair = tuple[Tensor, Tensor | None]


def ranges(
    groups: Tensor, scheme: Scheme, outer: Tensor | None = None, shrink: float = 1.0
) -> Pair:
    """Scales and zeros ``(..., 1)`` of groups ``(..., group)`` times ``shrink``."""
    if scheme.dtype == "int" and not scheme.symmetric:
        return _between(groups, scheme, shrink)
    if scheme.dtype == "int" and scheme.packed:
        return _nonzero(_extreme(groups) * (shrink / scheme.limits[0])), None
    top = scheme.limits[1] if scheme.dtype == "int" else largest(scheme.dtype)
    most = groups.abs().amax(-1, keepdim=True) * shrink
    if scheme.dtype == "mxfp4":  # its exponent, less that of the largest number
        return storable(_nonzero(most) / 4, scheme, outer), None
    return storable(_nonzero(most / top), scheme, outer), None


def _extreme(groups: Tensor) -> Tensor:
    """The number of largest magnitude, with its sign: it takes the code below zero, of which there
    is one more than above."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    return torch.where(high > -low, high, low)


def _between(groups: Tensor, scheme: Scheme, shrink: float) -> Pair:
    """From the smallest to the largest number, zero among them."""
    low = groups.amin(-1, keepdim=True).clamp(max=0) * shrink
    high = groups.amax(-1, keepdim=True).clamp(min=0) * shrink
    first, last = scheme.limits
    scales = _nonzero((high - low) / (last - first))
    return scales, first - low / scales


def _nonzero(scales: Tensor) -> Tensor:
    """A group of zeros has any scale: 1."""
    return torch.where(scales == 0, 1.0, scales)


def grid(scheme: Scheme) -> tuple[float, ...]:
    """What ranges are multiplied by in a search."""
    if scheme.dtype == "mxfp4":
        return (1.0, 2.0, 0.5)
    if scheme.dtype != "int":  # numbers lie closer around zero: the range matters less
        return (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.7)
    steps, least = (20, 0.9) if scheme.bits >= 6 else (24, 0.28)
    return tuple(1 - (1 - least) * step / steps for step in range(steps + 1))


def searched(
    groups: Tensor,
    scheme: Scheme,
    factors: tuple[float, ...],
    importance: Tensor | None,
    outer: Tensor | None,
) -> Pair:
    """The scales and zeros with the smallest squared error, times ``importance``, per group."""
    signs = (1.0, -1.0) if scheme.offset and scheme.symmetric else (1.0,)
    best, scales, zeros = None, torch.empty(0), None
    for factor in (f * sign for f in factors for sign in signs):
        scale, zero = ranges(groups, scheme, outer, factor)
        error = _squared(groups, scale, zero, scheme, importance)
        if best is None:
            best, scales, zeros = error, scale, zero
            continue
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        zeros = None if zero is None or zeros is None else torch.where(better, zero, zeros)
    return scales, zeros


def _squared(
    groups: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, importance: Tensor | None
) -> Tensor:
    off = coding.snap(groups, scale, zero, scheme).sub_(groups).square_()
    return (off if importance is None else off.mul_(importance)).sum(-1, keepdim=True)
