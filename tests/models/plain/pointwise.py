"""Norms and activations written out by hand, in the spellings that users and papers have."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class Scaled(nn.Module):
    """What the hand-written norms share: a weight, a bias and an epsilon over 8 features."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))
        self.eps = eps


class RmsPow(Scaled):
    """Zhang and Sennrich 2019, as Llama spells it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps))


class RmsNormDivided(Scaled):
    """Division by a square root, squares by multiplication."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + self.eps) * self.weight


class RmsOffset(Scaled):
    """Gemma's: the weight is an offset from one, the work is in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        floats = x.float()
        normed = floats * torch.rsqrt(floats.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).type_as(x)


class RmsByNorm(Scaled):
    """By the L2 norm; the epsilon is added *outside* the root, so this is not ``rms_norm``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        root = x.norm(2, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return x / (root + self.eps) * self.weight


class LayerNormVar(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)
        var = x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight + self.bias


class LayerNormSquares(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.bias + self.weight * (centred * scale)


class LayerNormUnbiased(Scaled):
    """The unbiased deviation with the epsilon outside: looks like LayerNorm, is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.weight * (x - mean) / (std + self.eps) + self.bias


class Activated(nn.Module):
    """A linear before the activation, so that there is something to fuse with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activate(self.linear(x))

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class GeluErf(Activated):
    """Hendrycks and Gimpel 2016, exact."""

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class GeluErfSwapped(Activated):
    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((x * 0.7071067811865476).erf() + 1) * x


class GeluTanh(Activated):
    """GPT-2's: by tanh, the cube by ``pow``."""

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class GeluTanhProduct(Activated):
    """GPT-NeoX's: the cube by products."""

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


class QuickGelu(Activated):
    """CLIP's approximation: near GELU, not equal to it."""

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Swish(Activated):
    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x) * x


class HardSwish(Activated):
    def activate(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.relu6(x + 3) / 6


class SwiGlu(nn.Module):
    """Shazeer 2020, two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate(x)
        return self.down(gate * torch.sigmoid(gate) * self.up(x))


class SwiGluFused(nn.Module):
    """One projection cut in two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 24), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.enter(x).chunk(2, dim=-1)
        return self.leave(F.silu(gate) * up)


NORMS = (RmsPow, RmsNormDivided, RmsOffset, RmsByNorm)
NORMS += (LayerNormVar, LayerNormSquares, LayerNormUnbiased)
ACTIVATIONS = (GeluErf, GeluErfSwapped, GeluTanh, GeluTanhProduct, QuickGelu, Swish, HardSwish)
MODULES = (*NORMS, *ACTIVATIONS, SwiGlu, SwiGluFused)
