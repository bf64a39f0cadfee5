"""HQQ: zero points that make a norm of the residual small which large residuals hardly count in.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": for scales s,
minimise ``sum |W - s (Q(W / s + z) - z)|**p`` over z, p < 1, by half-quadratic splitting. A copy e
of the residual r is shrunk, ``e = sign(r) max(|r| - |r|**(p - 1) / beta, 0)``, the zero point is
the mean of ``Q - (W / s - e)``, and beta grows. No data is needed.

Here residuals are counted in steps, so that one beta suits weights of any magnitude; each group
keeps the best zero point that it has come by; and scales may be those of a clipping search.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.quantized.codes import levels
from graphopt.kernels.quantized.rounding import Clip, find_scales, quantized_by
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight


class Splitting(NamedTuple):
    """The exponent p, the first beta and what it grows by, and the number of steps."""

    power: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    steps: int = 20


def hqq(
    weight: Tensor,
    scheme: Scheme,
    clip: Clip = "search",
    splitting: Splitting = Splitting(),  # noqa: B008 - a constant
) -> QuantizedWeight:
    """A weight ``(N, K)`` with optimised zero points.

    Args:
        clip: where scales and first zero points are from, as in `rounding.quantize`; ``"none"`` is
            the paper's.

    Raises:
        ValueError: the scheme has no zero points, or the weight cannot be quantized.
    """
    if scheme.symmetric:
        raise ValueError(
            "HQQ optimises zero points, which this scheme has not: dtype='int', symmetric=False"
        )
    if clip not in ("none", "search"):
        raise ValueError(f"clip is {clip!r}; it is 'none' or 'search'")

    def find(groups: Tensor) -> tuple[Tensor, Tensor]:
        scales, zeros = find_scales(groups, scheme, search=clip == "search")
        assert zeros is not None  # of a scheme that is not symmetric
        return scales, _optimised(groups, scales, zeros, scheme, splitting)

    return quantized_by(weight.detach(), scheme, find)


def _optimised(
    groups: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, splitting: Splitting
) -> Tensor:
    scaled, beta = groups / scales, splitting.beta
    best, found = torch.full_like(zeros, torch.inf), zeros
    for _ in range(splitting.steps):
        codes = levels(groups, scales, zeros, scheme)
        residual = scaled - codes + zeros
        size = residual.abs().clamp_(min=1e-9)
        power = size.pow(splitting.power - 1)
        error = (size * power).sum(-1, keepdim=True)
        found = torch.where(error < best, zeros, found)
        best = torch.minimum(error, best)
        shrunk = (size - power / beta).clamp_(min=0).copysign(residual)
        zeros = (codes - scaled + shrunk).mean(-1, keepdim=True)
        beta *= splitting.growth
    return found
