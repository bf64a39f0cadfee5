"""Activations in 8 bits by one scale and one zero point for the tensor, found ahead of time.

``q = clamp(round(x / scale) + zero, 0, 255)`` stands for ``(q - zero) * scale``; numbers beyond
what 0 and 255 stand for saturate (Jacob et al. 2018, "Quantization and training of neural networks
for efficient integer-arithmetic-only inference", section 2.1). The product is then
``y = scale * sum_g scale_g * ((q_g - zero) @ (codes_g - zero_g).T) + bias`` over the groups g of K,
where products of codes are exact in int32 and the rest is float32, or float64 where x is. A row
that holds NaN or infinity gives no finite number.

Paths compute on signed ``q - 128``, int8. What the zero point adds to each output channel is the
product of one more row, in which every code is ``zero - 128``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.quantized.definition import HELD, integer_products, pieces
from graphopt.kernels.quantized.weight import QuantizedWeight

MIDDLE, LAST = 128, 255


class Static(NamedTuple):
    """What activations are quantized by.

    Attributes:
        scale: positive; a float32 number, so that every runtime reads the same.
        zero: the code, 0 to 255, that stands for 0.
    """

    scale: float
    zero: int

    @property
    def signed(self) -> int:
        """The zero point of codes that are int8."""
        return self.zero - MIDDLE

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest number that a code stands for."""
        return -self.zero * self.scale, (LAST - self.zero) * self.scale


def read(activations: str, scale: float | None = None, zero: int = MIDDLE) -> Static | None:
    """The last arguments of an operator; None where activations are not static.

    Raises:
        ValueError: they do not go with its ``activations``, or are out of range.
    """
    if activations != "static":
        if scale is not None:
            raise ValueError(f"input_scale goes with activations='static', not {activations!r}")
        return None
    if scale is None or not 0 < scale < math.inf:
        raise ValueError(f"static activations have a positive input_scale, not {scale}")
    if not 0 <= zero <= LAST:
        raise ValueError(f"input_zero is 0 to {LAST}, not {zero}")
    return Static(scale, zero)


def static_of(given: Mapping[str, Any]) -> Static | None:
    """Of the arguments of an operator, by name; an embedding has none."""
    scale = given.get("input_scale")
    return None if scale is None else Static(scale, given["input_zero"])


def quantized(x: Tensor, given: Static) -> Tensor:
    """Codes of x less 128, whole numbers in float32 or float64; NaN where x has it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / given.scale).round_().add_(given.signed).clamp_(-MIDDLE, LAST - MIDDLE)


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, given: Static) -> Tensor:
    """The definition: ``x (M, K)`` to ``(M, N)`` in the dtype of x."""
    made = x.new_empty((x.shape[0], weight.shape[0]))
    scaled = quantized(x, given)
    q = scaled.new_empty((len(x) + 1, weight.width), dtype=torch.int8)
    q[:-1], q[-1] = scaled, given.signed
    factor = row_factors(x, given.scale)
    held = max(len(q), 0 if weight.codes.dtype == torch.int8 else weight.width)
    for rows, piece in pieces(weight, held, HELD):
        part = integer_products(q, piece, scaled.dtype)
        torch.mul(part[:-1].sub_(part[-1:]), factor, out=part[:-1])
        made[:, rows] = part[:-1] if bias is None else part[:-1].add_(bias[rows])
    return made


def row_factors(x: Tensor, scale: float) -> Tensor:
    """The scale for each row ``(M, 1)``; NaN for those that hold NaN or infinity, whose codes are
    numbers."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.sum(-1, keepdim=True, dtype=wide).mul_(0.0).add_(scale)
