"""The range of activations that 256 codes are spread over, found on samples.

``"minmax"``: all that was seen; one outlier makes every step larger. ``"percentile"``: but for what
lies outside of a share of it (Krishnamoorthi 2018, "Quantizing deep convolutional networks for
efficient inference", section 3; Wu et al. 2020, "Integer quantization for deep learning inference",
section 3.3: 99.99 %). ``"mse"``: the range with the smallest squared error, of rounding within it
and of cutting off beyond it (Nagel et al. 2021, "A white paper on neural network quantization",
section 3.1). Here each number counts by the weights that it meets, so that what is made small is
the squared error of the product, as far as errors of its inputs do not cancel.

Errors are measured on a histogram, of all numbers or of evenly spaced rows where there are many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from graphopt.kernels.quantized.static import LAST, Static

PERCENTILE = 99.99
"""Of numbers that ``"percentile"`` keeps, in percent; what is left out is cut off at both ends."""
BINS = 1 << 14
"""Of the histogram: a range of 1/32 of what was seen has two bins for each code."""
_MOST = 1 << 22
"""Numbers of a sample that are counted, at most."""
_TRIED, _LEAST, _TURNS = 64, 1 / 32, 2
"""Ends that are tried at a time, the nearest to zero as a share of what was seen, and how often."""

Samples = Callable[[], Iterable[Tensor]]


def find(samples: Samples, ranges: str | float, importance: Tensor | None = None) -> Static | None:
    """Scale and zero point; ``None`` where there are no numbers, or all are zero.

    Args:
        samples: gives tensors ``(..., K)``, each time it is called.
        ranges: ``"mse"``, ``"minmax"``, ``"percentile"``, or a percentile.
        importance: ``(K,)``: what numbers of each column count.

    Raises:
        ValueError: a sample holds NaN or infinity, and is named by its number.
    """
    low, high = _extremes(samples())
    if low == high:  # both are 0
        return None
    if ranges != "minmax":
        counts = _histogram(samples(), low, high, importance if ranges == "mse" else None)
        if ranges == "mse":
            low, high = _least_error(counts, low, high)
        else:
            share = PERCENTILE if isinstance(ranges, str) else ranges
            low, high = _between(counts, low, high, share)
    return between(low, high)


def between(low: float, high: float) -> Static:
    """Codes for ``low <= 0 <= high``, which stand for zero exactly."""
    step = max((high - low) / LAST, torch.finfo(torch.float32).tiny)
    return Static(float(torch.tensor(step, dtype=torch.float32)), round(min(-low / step, LAST)))


def _extremes(samples: Iterable[Tensor]) -> tuple[float, float]:
    """The smallest and the largest number, and zero."""
    low = high = 0.0
    for index, sample in enumerate(samples):
        if not sample.numel():
            continue
        least, most = (float(value) for value in sample.detach().aminmax())
        if not (abs(least) < torch.inf and abs(most) < torch.inf):
            raise ValueError(f"calibration[{index}] gives NaN or infinity")
        low, high = min(low, least), max(high, most)
    return low, high


def _histogram(
    samples: Iterable[Tensor], low: float, high: float, importance: Tensor | None
) -> Tensor:
    """What numbers in each of `BINS` bins count, float64."""
    counts = torch.zeros(BINS, dtype=torch.float64)
    for sample in samples:
        rows = sample.detach().reshape(-1, sample.shape[-1])
        rows = rows[:: max(1, -(-rows.numel() // _MOST))].to(torch.float32)
        place = ((rows - low) * (BINS / (high - low))).to(torch.int64).clamp_(0, BINS - 1)
        weights = None if importance is None else importance.to(rows).expand(rows.shape).flatten()
        counts += torch.bincount(place.flatten(), weights, BINS).to("cpu", torch.float64)
    return counts


def _between(counts: Tensor, low: float, high: float, percent: float) -> tuple[float, float]:
    """What keeps a share of the numbers, half of the rest at either end."""
    passed = counts.cumsum(0) / counts.sum()
    out = (1 - percent / 100) / 2
    first = int((passed <= out).sum())
    last = int((passed < 1 - out).sum())
    width = (high - low) / BINS
    return min(low + first * width, 0.0), max(low + (last + 1) * width, 0.0)


def _least_error(counts: Tensor, low: float, high: float) -> tuple[float, float]:
    """Both ends, one after the other, where the squared error is smallest."""
    held = counts > 0
    width = (high - low) / BINS
    values = (low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5))[held]
    counts = counts[held]
    shares = torch.logspace(0, -5, _TRIED, base=2, dtype=torch.float64).clamp(min=_LEAST)
    best = (low, high)
    for _ in range(_TURNS):
        for end in (1, 0):
            tried = torch.tensor(best, dtype=torch.float64).repeat(_TRIED + 1, 1)
            tried[1:, end] = shares * (low, high)[end]
            best = tuple(tried[int(_errors(values, counts, tried).argmin())].tolist())
    return best


def _errors(values: Tensor, counts: Tensor, ends: Tensor) -> Tensor:
    """Squared errors with each of some ranges ``(n, 2)``."""
    found = []
    for low, high in ends.tolist():
        given = between(low, high)
        codes = (values / given.scale).round().add_(given.zero).clamp_(0, LAST)
        off = codes.sub_(given.zero).mul_(given.scale).sub_(values)
        found.append((off.square_() * counts).sum())
    return torch.stack(found)
