"""Scales and zero points as something that can be learned, while codes stay as they are.

A number ``(code - zero) * scale`` is linear in either, and no rounding stands between it and its
gradient: Kim et al. 2023, "Memory-Efficient Fine-Tuning of Compressed Large Language Models via
sub-4-bit Integer Quantization" (PEQA), equation 2; zero points besides as in Chen et al. 2024,
"EfficientQAT", section 3.3. They move by Adam (Kingma & Ba 2015), scales in parts of themselves and
zero points in codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.kernels.quantized import scales as scaling
from graphopt.kernels.quantized.learnable import Adam, LearnableWeight
from graphopt.kernels.quantized.refine import levels
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.signround import through
from graphopt.kernels.quantized.weight import QuantizedWeight

_SPEED = (0.1, 1.0)
"""Of scales and zero points: how far all rates together may carry them is half of that."""


def can_learn(scheme: Scheme) -> bool:
    """Whether scales are of a format fine enough for small steps."""
    return scheme.dtype not in ("mxfp4", "nvfp4")


class LearnedScales(LearnableWeight):
    """The scales and zero points of a quantized weight ``(N, K)``; `can_learn` says of which."""

    def __init__(self, start: QuantizedWeight) -> None:
        self.start, self.scheme, wide = start, start.scheme, torch.float32
        self.scales = start.scales.to(wide)[..., None]
        self.zeros = None if start.zeros is None else start.zeros.to(wide)[..., None]
        self.levels = levels(start.unpacked(), self.scheme).unflatten(1, (self.scales.shape[1], -1))
        count = 1 if self.zeros is None else 2
        self.moves = [torch.zeros_like(self.scales).requires_grad_() for _ in range(count)]
        self.adam = Adam(self.moves, _SPEED[:count])

    def read(self) -> Tensor:
        """The numbers as they will be read back, ``(N, K)``, float32."""
        scales, zeros = self._ranges()
        shifted = self.levels if zeros is None else self.levels - zeros
        return (shifted * scales).flatten(1)

    def descend(self, rate: float) -> None:
        """A step of Adam along the gradients, which are forgotten."""
        self.adam.step(rate)

    def stored(self) -> QuantizedWeight:
        """The quantized weight: the same codes, and as many bytes."""
        with torch.no_grad():
            scales, zeros = (None if r is None else r.squeeze(-1) for r in self._ranges())
        assert scales is not None
        fits = self.start.scales.dtype
        return QuantizedWeight(
            self.scheme,
            self.start.width,
            self.start.codes,
            scales.to(fits),
            None if zeros is None else zeros.to(fits),
        )

    def _ranges(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros ``(N, G, 1)``, as they will be stored."""
        scales = through(self.scales * (1 + self.moves[0]), self._kept)
        if self.zeros is None:
            return scales, None
        return scales, through(self.zeros + self.moves[1], self._kept)

    def _kept(self, numbers: Tensor) -> Tensor:
        return scaling.kept(numbers, self.scheme)
