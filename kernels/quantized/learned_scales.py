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
from graphopt.kernels.quantized.refine import levels
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.signround import through
from graphopt.kernels.quantized.weight import QuantizedWeight

_FIRST, _SECOND = 0.9, 0.95
"""Decay of the mean gradient and of its mean square, over steps that are few."""
_SPEED = (0.1, 1.0)
"""Of scales and zero points: how far rates that sum up to 1/2 may carry them is half of that."""


def can_learn(scheme: Scheme) -> bool:
    """Whether scales are of a format fine enough for small steps."""
    return scheme.dtype not in ("mxfp4", "nvfp4")


class LearnedScales:
    """The scales and zero points of a quantized weight ``(N, K)``; `can_learn` says of which."""

    def __init__(self, start: QuantizedWeight) -> None:
        self.start, self.scheme, wide = start, start.scheme, torch.float32
        self.scales = start.scales.to(wide)[..., None]
        self.zeros = None if start.zeros is None else start.zeros.to(wide)[..., None]
        self.levels = levels(start.unpacked(), self.scheme).unflatten(1, (self.scales.shape[1], -1))
        count = 1 if self.zeros is None else 2
        self.moves = [torch.zeros_like(self.scales).requires_grad_() for _ in range(count)]
        self.means = [torch.zeros(2, *self.scales.shape, device=m.device) for m in self.moves]
        self.count = 0

    def read(self) -> Tensor:
        """The numbers as they will be read back, ``(N, K)``, float32."""
        scales, zeros = self._ranges()
        shifted = self.levels if zeros is None else self.levels - zeros
        return (shifted * scales).flatten(1)

    def descend(self, rate: float) -> None:
        """A step of Adam along the gradients, which are forgotten."""
        self.count += 1
        with torch.no_grad():
            for moved, (first, second), speed in zip(self.moves, self.means, _SPEED, strict=False):
                if moved.grad is not None:
                    first.lerp_(moved.grad, 1 - _FIRST)
                    second.lerp_(moved.grad.square(), 1 - _SECOND)
                    size = (second / (1 - _SECOND**self.count)).sqrt_()
                    size += torch.finfo(torch.float32).tiny
                    moved.addcdiv_(first, size, value=-rate * speed / (1 - _FIRST**self.count))
                    moved.grad = None

    def places(self) -> list[Tensor]:
        """Where everything that moves is, copied."""
        return [moved.detach().clone() for moved in self.moves]

    def move(self, places: list[Tensor]) -> None:
        """Back to `places`."""
        with torch.no_grad():
            for moved, place in zip(self.moves, places, strict=True):
                moved.copy_(place)

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
