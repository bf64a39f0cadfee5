"""The numbers of 4-bit formats that are not integers, and the nearest of them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0 to 7; codes 8 to 15 are their negatives (OCP MX 1.0, section 5.3.3)."""


@cache
def nf4() -> Tensor:
    """NormalFloat4 ``(16,)``, float64, rising from -1 to 1, 0 among them.

    Dettmers et al. 2023, "QLoRA", section 3: quantiles of the normal distribution at probabilities
    between 1/2 and ``1 - (1/30 + 1/32) / 2``, 8 numbers above zero and 7 below, divided by the
    largest. (The end leaves half a bin outside, the mean of what 15 and 16 bins would leave.)
    """
    end = 1 - (1 / 30 + 1 / 32) / 2
    above = _quantiles(end, 9)
    below = -_quantiles(end, 8).flip(0)
    return torch.cat((below, above.new_zeros(1), above)) / above[-1]


def _quantiles(end: float, count: int) -> Tensor:
    """Of the normal distribution, without the one at 1/2, rising."""
    places = torch.linspace(0.5, end, count, dtype=torch.float64, device="cpu")[1:]
    return torch.special.ndtri(places)


@cache
def table(dtype: str) -> Tensor:
    """What each code, read as a byte, stands for: float32, on the CPU."""
    if dtype == "fp8":
        return torch.arange(256, device="cpu").to(torch.uint8).view(torch.float8_e4m3fn).float()
    if dtype == "nf4":
        return nf4().to(torch.float32)
    magnitudes = torch.tensor(E2M1, dtype=torch.float32, device="cpu")
    return torch.cat((magnitudes, -magnitudes))


@cache
def largest(dtype: str) -> float:
    """What the largest magnitude of a group is scaled to."""
    return 448.0 if dtype == "fp8" else 1.0 if dtype == "nf4" else E2M1[-1]


@cache
def _edges() -> tuple[float, ...]:
    """Where the nearest number of NF4 changes."""
    values = nf4()
    return tuple(((values[1:] + values[:-1]) / 2).tolist())


def nearest(values: Tensor, dtype: str) -> Tensor:
    """Codes, uint8, of the numbers of a table that are nearest to float32 ``values``."""
    if dtype != "nf4":
        return _nearest_e2m1(values)
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for edge in _edges():  # comparisons are twice as fast as torch.bucketize
        codes += values > edge
    return codes


def _nearest_e2m1(values: Tensor) -> Tensor:
    """Numbers are 1/2 apart up to 2, 1 up to 4, and 2 beyond; a tie goes to the even code."""
    size = values.abs().clamp_(max=6)
    coarse, coarser = size > 2, size > 4
    step = 0.5 + 0.5 * coarse + coarser
    magnitude = (size / step).round_().add_(2 * coarse).add_(2 * coarser)
    negative = (values < 0) & (magnitude > 0)
    return magnitude.add_(8 * negative).to(torch.uint8)


def look_up(codes: Tensor, dtype: str) -> Tensor:
    """Float32 numbers of codes. (torch converts float8 at a third of the speed.)"""
    found = table(dtype).to(codes.device).index_select(0, codes.flatten().view(torch.uint8).int())
    return found.view(codes.shape)
