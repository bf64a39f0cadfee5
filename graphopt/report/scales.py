"""Axes of plots: from values to places between 0 and 1, with round ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

TICKS = 6
DECADES = 2.0
"""Decades that values span from which on their axis is logarithmic."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``; ``ticks`` are values and their labels."""

    title: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value stands: 0 at the low end, 1 at the high one."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)


def round_step(span: float, most: int = TICKS) -> float:
    """The smallest of 1, 2 and 5 times a power of ten of which ``most`` make up ``span``."""
    raw = span / most
    power = 10.0 ** math.floor(math.log10(raw))
    steps = (factor * power for factor in (1, 2, 5))
    return next((step for step in steps if step >= raw * (1 - 1e-9)), 10 * power)


def linear(title: str, values: Sequence[float], *, least: float = 0.0, zero: bool = False) -> Axis:
    """An axis around finite values that ends at round numbers.

    Args:
        least: what it spans at least; zero: it starts at 0.
    """
    low, high = (0.0 if zero else min(values)), max(values)
    spare = (least or abs(high) or 1.0) - (high - low)
    if high == low or (least and spare > 0):
        low, high = (low, high + spare) if zero else (low - spare / 2, high + spare / 2)
    step = round_step(high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple((i * step, _label(i * step, step)) for i in range(first, last + 1))
    return Axis(title, first * step, last * step, ticks)


def positive(title: str, values: Sequence[float]) -> Axis:
    """Logarithmic where values are positive and span some decades, linear otherwise."""
    low, high = min(values), max(values)
    if low <= 0 or math.log10(high / low) < DECADES:
        return linear(title, values)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, round(round_step(last - first))) if last - first > TICKS else 1
    ticks = tuple((10.0**i, f"1e{i}") for i in range(first, last + 1, every))
    return Axis(title, 10.0**first, 10.0**last, ticks, log=True)


def sizes(title: str, values: Sequence[float], *, zero: bool = True) -> Axis:
    """Of bytes, in the unit of the largest."""
    place = min(int(math.log2(max(*values, 1)) / 10), len(_UNITS) - 1)
    unit = 1024.0**place
    found = linear(f"{title}, {_UNITS[place]}", [v / unit for v in values], zero=zero)
    ticks = tuple((value * unit, label) for value, label in found.ticks)
    return Axis(found.title, found.low * unit, found.high * unit, ticks)


def _label(value: float, step: float) -> str:
    digits = max(0, -math.floor(math.log10(step)))
    return f"{value:.{digits}f}" if digits < 6 and step < 1e6 else f"{value:.3g}"
