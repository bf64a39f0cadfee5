"""How near quantized values are to the exact ones: energy of signal and noise, and divergence.

With a reference r and a value v: error ``|v - r| / |r|``, signal to quantization noise ratio
``SQNR = 10 log10(|r|^2 / |v - r|^2)`` in dB (Widrow and Kollar 2008, "Quantization noise", section
1.1), cosine ``v.r / (|v| |r|)``, and for logits the mean over rows of ``KL(softmax(r) ||
softmax(v))`` (Kullback and Leibler 1951), in nats. Sums of energies are those of values joined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**22
"""Numbers that are looked at together, so that float64 copies stay small."""


@dataclass(frozen=True)
class Energy:
    """Sums over finite numbers: ``r^2``, ``(v - r)^2``, ``v^2`` and ``v r``; and their count."""

    signal: float = 0.0
    noise: float = 0.0
    power: float = 0.0
    product: float = 0.0
    count: int = 0

    def __add__(self, other: Energy) -> Energy:
        return Energy(
            self.signal + other.signal,
            self.noise + other.noise,
            self.power + other.power,
            self.product + other.product,
            self.count + other.count,
        )

    @property
    def error(self) -> float:
        """Relative to the reference; the noise itself where that is all zeros."""
        return math.sqrt(self.noise / (self.signal or 1.0))

    def beside(self, whole: Energy) -> float:
        """The RMS error relative to the RMS of these values, or of the whole where it is larger."""
        noise, own = (total / max(self.count, 1) for total in (self.noise, self.signal))
        return math.sqrt(noise / (max(own, whole.signal / max(whole.count, 1)) or 1.0))

    @property
    def sqnr(self) -> float | None:
        """In dB; ``None`` without noise or without a signal."""
        if not self.noise or not self.signal:
            return None
        return 10 * (math.log10(self.signal) - math.log10(self.noise))

    @property
    def cosine(self) -> float | None:
        """``None`` where one of the two is all zeros."""
        if not self.power or not self.signal:
            return None
        return max(-1.0, min(1.0, self.product / math.sqrt(self.power) / math.sqrt(self.signal)))


@dataclass(frozen=True)
class Divergence:
    """A sum over rows, in nats, and how many rows there were."""

    total: float = 0.0
    rows: int = 0

    def __add__(self, other: Divergence) -> Divergence:
        return Divergence(self.total + other.total, self.rows + other.rows)

    @property
    def mean(self) -> float | None:
        return self.total / self.rows if self.rows else None


def energy(value: Any, reference: Any) -> Energy | None:
    """Of one value; ``None`` where it is not floating. Places that are not finite are left out."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    total = Energy()
    pairs = (t.detach().reshape(-1).split(CHUNK) for t in (value, reference))
    for some, exact in zip(*pairs, strict=True):
        total += _energy(some.double(), exact.double())
    return total


def _energy(value: Tensor, exact: Tensor) -> Energy:
    finite = value.isfinite() & exact.isfinite()
    if not bool(finite.all()):
        value, exact = value[finite], exact[finite]
    off = value - exact
    pairs = ((exact, exact), (off, off), (value, value), (value, exact))
    signal, noise, power, product = (float(torch.dot(a, b)) for a, b in pairs)
    return Energy(signal, noise, power, product, exact.numel())


def divergence(value: Tensor, reference: Tensor) -> Divergence:
    """Of rows of logits ``(..., classes)``; rows in which something is NaN are left out."""
    classes, total = value.shape[-1], Divergence()
    rows = max(1, CHUNK // max(classes, 1))
    pairs = (t.detach().reshape(-1, classes).split(rows) for t in (value, reference))
    for some, exact in zip(*pairs, strict=True):
        total += _divergence(some.double(), exact.double())
    return total


def _divergence(value: Tensor, exact: Tensor) -> Divergence:
    wanted, found = exact.log_softmax(-1), value.log_softmax(-1)
    terms = torch.where(wanted.isneginf(), 0.0, wanted.exp() * (wanted - found))
    each = terms.sum(-1).clamp_min(0.0)  # below is rounding
    known = each[~each.isnan()]
    return Divergence(float(known.sum()), known.numel())
