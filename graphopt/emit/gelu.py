"""GELU for Inductor on a CPU, whose vectors of erf are slow.

Bound: one read and one write for each number. Inductor's erf is what takes the time: on two cores
with AVX-512, 1024 x 1536 numbers take 1.3 ms in float32 and 0.4 ms by the formula here; where its
result is read twice, erf is even computed twice, and an exponential is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

_P = 0.3275911
_A = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def quick_gelu(x: Tensor) -> Tensor:
    """``x (1 + erf(x / sqrt 2)) / 2``, float32, with an absolute error below 4e-7.

    The complement of erf is the rational approximation 7.1.26 of Abramowitz and Stegun, "Handbook
    of Mathematical Functions", which is within 1.5e-7. PyTorch's own kernel is within 1.3e-6.
    """
    size = x.abs() * 0.5**0.5
    t = 1 / (1 + _P * size)
    tail = torch.zeros_like(t)
    for a in reversed(_A):
        tail = t * (a + tail)
    half = x * (0.5 * tail * torch.exp(-size * size))
    return torch.where(x >= 0, x - half, half)
