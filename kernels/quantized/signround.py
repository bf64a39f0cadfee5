"""Rounding as something that can be learned: numbers of a weight as a function of small shifts.

Cheng et al. 2024, "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of
LLMs" (SignRound): before it is rounded each number is shifted by V, between -1/2 and 1/2 of a step,
and the range of each group is stretched; both move by a fixed rate against the sign of their
gradient, which passes rounding straight through.

With t the numbers, s and z scale and zero point of their group and h the step (1 for integers, the
distance between the neighbours in a table), what is read back is ``y = (q - z) * s`` with
``q = round(t / s + z + h * V)``, and the gradients are

* ``dy/dV = h * s`` where q was not clipped, else 0;
* ``dy/ds = q - z - t / s`` where q was not clipped, else ``q - z``;
* ``dy/dz = 0`` where q was not clipped, else ``-s``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.quantized import codes as coding
from graphopt.kernels.quantized import scales as scaling
from graphopt.kernels.quantized import tables
from graphopt.kernels.quantized.learnable import LearnableWeight
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight


class LearnedRounding(LearnableWeight):
    """The rounding of a weight ``(N, K)``, from the scales of a quantized form of it.

    Shifts of zero round each number to the nearest for those scales.
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight) -> None:
        self.scheme, self.outer = start.scheme, start.tensor_scale
        wide = torch.float32
        self.scales = scaling.load(start.scales, self.scheme, self.outer, wide)[..., None]
        self.zeros = None if start.zeros is None else start.zeros.to(wide)[..., None]
        grouped = (start.scales.shape[1], -1)
        numbers = weight.detach().to(wide).unflatten(1, grouped)
        self.numbers = numbers
        self.steps: Tensor | float = 1.0
        if self.scheme.dtype != "int":
            self.steps = _gaps(numbers / self.scales, self.scheme.dtype)
        self.shifts = torch.zeros_like(numbers).requires_grad_()
        count = 0 if self.scheme.dtype == "mxfp4" else 1 if self.zeros is None else 2
        self.ends = [torch.zeros_like(self.scales).requires_grad_() for _ in range(count)]
        self.moves = [self.shifts, *self.ends]

    def read(self) -> Tensor:
        """The numbers as they will be read back, ``(N, K)``, float32."""
        scales, zeros = self._ranges()
        made: Tensor = Snap.apply(self.numbers, self.shifts, scales, zeros, self.steps, self.scheme)
        return made.flatten(1)

    def descend(self, rate: float) -> None:
        """Move against the signs of the gradients, and forget these.

        An end of a range moves by as large a part of it as two shifts of all of it would.
        """
        with torch.no_grad():
            for moved, most in ((self.shifts, 0.5), *((end, self._most) for end in self.ends)):
                if moved.grad is not None:
                    moved.add_(moved.grad.sign_(), alpha=-2 * most * rate).clamp_(-most, most)
                    moved.grad = None

    @property
    def _most(self) -> float:
        """By how much of the range an end of it moves."""
        return 0.5 / max(len(self.ends), 1)

    def stored(self) -> QuantizedWeight:
        """The quantized weight."""
        with torch.no_grad():
            scales, zeros = self._ranges()
            shifted = _shifted(self.numbers, self.shifts, scales, zeros, self.steps)
            codes = coding.encode(shifted, torch.ones_like(scales), None, self.scheme)
            kept = scaling.store(scales.squeeze(-1), self.scheme, self.outer)
            zero = None if zeros is None else zeros.squeeze(-1).to(kept.dtype)
        return QuantizedWeight.from_codes(codes.flatten(1), kept, zero, self.scheme, self.outer)

    def _ranges(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros ``(N, G, 1)`` of the ranges, stretched, as they will be stored."""
        if not self.ends:
            return self.scales, self.zeros
        scales = self.scales * (1 + sum(self.ends[1:], self.ends[0]))
        scales = through(scales, self._kept_scales)
        if self.zeros is None:
            return scales, None
        first, last = self.scheme.limits
        low = (first - self.zeros - (last - first) * self.ends[0]) * self.scales
        return scales, through(first - low / scales, lambda z: scaling.kept(z, self.scheme))

    def _kept_scales(self, scales: Tensor) -> Tensor:
        kept = scaling.kept(scales, self.scheme)
        return scaling.storable(kept, self.scheme, self.outer)


def through(numbers: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Rounded, with the gradient passed straight through."""
    return numbers + (rounded(numbers.detach()) - numbers.detach())


def _shifted(
    numbers: Tensor, shifts: Tensor, scales: Tensor, zeros: Tensor | None, steps: Tensor | float
) -> Tensor:
    made = numbers / scales
    if zeros is not None:
        made += zeros
    if isinstance(steps, Tensor):
        return made.addcmul_(shifts, steps)
    return made.add_(shifts, alpha=steps)


class Snap(torch.autograd.Function):
    """Numbers ``(N, G, group)`` as they are read back; gradients as above.

    That of the numbers themselves is ``dy/dt = 1`` where q was not clipped, else 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        numbers: Tensor,
        shifts: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        steps: Tensor | float,
        scheme: Scheme,
    ) -> Tensor:
        shifted = _shifted(numbers, shifts, scales, zeros, steps)
        low, high = _span(scheme)
        inside = (shifted >= low) & (shifted <= high)
        levels = coding.levels(shifted, torch.ones_like(scales), None, scheme)
        if scheme.dtype != "int":
            levels = tables.look_up(levels, scheme.dtype)
        elif zeros is not None:
            levels = levels - zeros
        ctx.save_for_backward(numbers, scales, levels, inside)
        ctx.steps, ctx.zeros = steps, zeros is not None
        return levels * scales

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        numbers, scales, levels, inside = ctx.saved_tensors
        passed = grad * inside
        by_scale = (grad * levels).sum(-1, keepdim=True)
        by_scale -= (passed * numbers).sum(-1, keepdim=True) / scales
        by_zero = None
        if ctx.zeros:
            by_zero = (passed.sum(-1, keepdim=True) - grad.sum(-1, keepdim=True)) * scales
        by_number = passed.clone() if ctx.needs_input_grad[0] else None
        return by_number, passed.mul_(scales).mul_(ctx.steps), by_scale, by_zero, None, None


def _span(scheme: Scheme) -> tuple[float, float]:
    """Between which scaled numbers are not clipped."""
    if scheme.dtype == "int":
        first, last = scheme.limits
        return first - 0.5, last + 0.5
    most = tables.largest(scheme.dtype)
    return -most, most


def _gaps(scaled: Tensor, dtype: str) -> Tensor:
    """The distance of the two numbers of a table that each number lies between."""
    values = tables.table(dtype)
    values = values[values.isfinite()].unique().to(scaled.device)
    above = torch.bucketize(scaled, values).clamp_(1, len(values) - 1)
    return values[above] - values[above - 1]
