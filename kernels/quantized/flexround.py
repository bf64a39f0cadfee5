"""FlexRound: each number is divided before it is rounded, by a factor that is learned.

Lee et al. 2023, "FlexRound: Learnable Rounding based on Element-wise Division for Post-Training
Quantization", section 3.2: ``y = s1 * (clip(round(W / (s1 * S2 * s3) + z)) - z)`` with one s1 for
each group, S2 for each number and s3 for each output channel, all positive. S2 and s3 are forgotten
once codes are found. Rounding passes gradients straight through; a number then moves its own S2 by
as much as it is large (proposition 3.1), so that large weights get codes further away.

S2, s3 and what s1 is multiplied by are learned as logarithms, which start at 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.kernels.quantized import codes as coding
from graphopt.kernels.quantized import scales as scaling
from graphopt.kernels.quantized.cells import all_levels, grouped
from graphopt.kernels.quantized.learnable import Adam, LearnableWeight
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.signround import Snap, through
from graphopt.kernels.quantized.weight import QuantizedWeight

SPEED = 0.7
"""Of S2, divided by the codes between zero and the largest: the more there are, the less moves a
number to the next. Of 0.12 to 8, 0.5 was best at 2 and 3 bits and 1 at 4. See `Learnable.descend`
for rates."""
SHARED = 0.1
"""Of s1 and s3."""


class FlexRound(LearnableWeight):
    """Codes and scales of a weight ``(N, K)``, from those of a quantized form; zero points stay."""

    def __init__(self, weight: Tensor, start: QuantizedWeight) -> None:
        self.start, self.scheme, found = start, start.scheme, grouped(weight, start)
        self.scales, self.zeros = found.scales, found.zeros
        shifted = found.scaled if self.zeros is None else found.scaled - self.zeros
        self.numbers = shifted * self.scales
        self.divisors = torch.zeros_like(self.numbers).requires_grad_()
        self.channels = self.scales.new_zeros(len(self.scales), 1, 1).requires_grad_()
        self.stretch = torch.zeros_like(self.scales).requires_grad_()
        self.moves = [self.divisors, self.channels]
        speeds = [SPEED / _steps(self.scheme), SHARED]
        if self.scheme.dtype != "mxfp4":  # whose scales are powers of two
            self.moves.append(self.stretch)
            speeds.append(SHARED)
        self.adam = Adam(self.moves, speeds)

    def read(self) -> Tensor:
        """The numbers as they will be read back, ``(N, K)``, float32, differentiable."""
        none = self.scales.new_zeros(())
        made: Tensor = Snap.apply(
            self._divided(), none, self._scales(), self.zeros, 1.0, self.scheme
        )
        return made.flatten(1)

    def descend(self, rate: float) -> None:
        self.adam.step(rate)

    def stored(self) -> QuantizedWeight:
        """The quantized weight, of as many bytes."""
        start = self.start
        with torch.no_grad():
            scales = self._scales()
            codes = coding.encode(self._divided(), scales, self.zeros, self.scheme)
            kept = scaling.store(scales.squeeze(-1), self.scheme, start.tensor_scale)
            zeros = None if start.zeros is None else start.zeros.to(kept.dtype)
        return QuantizedWeight.from_codes(
            codes.flatten(1), kept, zeros, self.scheme, start.tensor_scale
        )

    def _divided(self) -> Tensor:
        """``W / (S2 * s3)``."""
        return self.numbers * (-self.divisors - self.channels).exp()

    def _scales(self) -> Tensor:
        """s1 as it will be stored."""
        return through(self.scales * self.stretch.exp(), self._kept)

    def _kept(self, scales: Tensor) -> Tensor:
        kept = scaling.kept(scales, self.scheme)
        return scaling.storable(kept, self.scheme, self.start.tensor_scale)


def _steps(scheme: Scheme) -> float:
    """The largest magnitude beside the step there."""
    values = all_levels(scheme)
    return float(values[-1] / (values[-1] - values[-2])) if len(values) > 1 else 1.0
