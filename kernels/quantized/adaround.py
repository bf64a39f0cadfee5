"""AdaRound: whether each number is rounded up or down is learned.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", section 3.2: with
l the code below a number, what is read while it learns is ``(l + h(V) - z) * s``, where

    h(V) = clip(sigmoid(V) * (zeta - gamma) + gamma, 0, 1)        zeta = 1.1, gamma = -0.1

is a rectified sigmoid (equation 23). It starts as the fraction that the number has, so that nothing
is rounded yet, and is driven to 0 or 1 by a charge of ``sum 1 - |2 h(V) - 1|**beta`` (equation 24),
whose beta falls: at first the charge is flat but near the ends. For the first steps there is none.
Gradients of s and z are not taken.

In a table, l and the code above are neighbours and h counts the distance between them. Codes may
come from another method than rounding: a number lies beside the code that was chosen, and the next
one on its side is the alternative.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from graphopt.kernels.quantized import codes as coding
from graphopt.kernels.quantized.cells import grouped, neighbours
from graphopt.kernels.quantized.learnable import Adam, LearnableWeight
from graphopt.kernels.quantized.weight import QuantizedWeight

ZETA, GAMMA = 1.1, -0.1
BETAS = (20.0, 2.0)
WARM = 0.2
"""Share of the steps without a charge."""
SPEED = 60.0
"""Of V, which goes from the middle to an end in 2.4; see `Learnable.descend` for rates."""


class AdaRound(LearnableWeight):
    """Codes of a weight ``(N, K)``, from those of a quantized form of it; scales stay."""

    relaxed: ClassVar[bool] = True

    def __init__(self, weight: Tensor, start: QuantizedWeight) -> None:
        self.start, found = start, grouped(weight, start)
        self.scales, self.zeros = found.scales, found.zeros
        self.below, above = neighbours(found.scaled, found.levels, start.scheme)
        self.gaps = above - self.below
        part = (found.scaled - self.below) / self.gaps.clamp(min=torch.finfo(torch.float32).tiny)
        is_up = found.levels > self.below
        low, high = torch.where(is_up, 0.501, 0.0), torch.where(is_up, 1.0, 0.499)
        self.logits = _inverse(part.clamp(low, high)).requires_grad_()
        self.moves = [self.logits]
        self.adam = Adam(self.moves, [SPEED])

    def read(self) -> Tensor:
        return self._numbers(self._levels())

    def soft(self) -> Tensor:
        return self._numbers(self.below + self.gaps * rectified(self.logits))

    def penalty(self, progress: float) -> Tensor | None:
        if progress < WARM:
            return None
        return charge(rectified(self.logits), annealed(progress))

    def descend(self, rate: float) -> None:
        self.adam.step(rate)

    def stored(self) -> QuantizedWeight:
        """The same scales and zero points, and as many bytes."""
        start, ones = self.start, torch.ones_like(self.scales)
        codes = coding.encode(self._levels(), ones, None, start.scheme)
        return QuantizedWeight.from_codes(
            codes.flatten(1), start.scales, start.zeros, start.scheme, start.tensor_scale
        )

    def _levels(self) -> Tensor:
        """Rounded."""
        return self.below + self.gaps * (self.logits.detach() >= 0)

    def _numbers(self, levels: Tensor) -> Tensor:
        shifted = levels if self.zeros is None else levels - self.zeros
        return (shifted * self.scales).flatten(1)


def rectified(logits: Tensor) -> Tensor:
    """h(V)."""
    return (logits.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _inverse(parts: Tensor) -> Tensor:
    """V for h between 0 and 1."""
    return ((parts - GAMMA) / (ZETA - GAMMA)).logit()


def charge(parts: Tensor, beta: float) -> Tensor:
    """``sum 1 - |2 h - 1|**beta``."""
    return (1 - (2 * parts - 1).abs().pow(beta)).sum()


def annealed(progress: float) -> float:
    """Beta falls evenly from the end of the first steps on."""
    start, end = BETAS
    return start + (end - start) * max(progress - WARM, 0.0) / (1 - WARM)
