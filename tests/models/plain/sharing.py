"""Parameters used more than once, and parametrized ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations


class TiedHead(nn.Module):
    """Embedding and output projection share one matrix, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 29, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


class SharedLayer(nn.Module):
    """One layer called three times, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.again = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.again, self.first):
            x = x + layer(x)
        return x


class TransposedTie(nn.Module):
    """An autoencoder whose decoder reads the encoder's weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        code = torch.sigmoid(x @ self.weight.t())
        return code @ self.weight + self.bias


class Frozen(nn.Module):
    """A parameter without gradient, a non-persistent buffer, and a plain tensor attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.linear.weight.requires_grad_(False)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8), persistent=False)
        self.shift = torch.linspace(-1, 1, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale + self.shift


class WeightNormed(nn.Module):
    """Weight norm in both spellings: as a parametrization and as a pre-forward hook."""

    def __init__(self) -> None:
        super().__init__()
        self.new = parametrizations.weight_norm(nn.Linear(8, 8))
        self.other_dim = parametrizations.weight_norm(nn.Linear(8, 8), dim=1)
        self.old = nn.utils.weight_norm(nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.old(torch.relu(self.other_dim(torch.relu(self.new(x)))))


class WeightNormedConv(nn.Module):
    """Weight norm on a grouped 1-D convolution over the feature axis of ``(N, L, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.convolution = parametrizations.weight_norm(convolution, dim=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x.transpose(1, 2)).transpose(1, 2)


class SpectralNormed(nn.Module):
    """Spectral norm: in training one step of power iteration writes its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Symmetric(nn.Module):
    """A parametrization of the user's own."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class UserParametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        nn.utils.parametrize.register_parametrization(self.linear, "weight", Symmetric())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


MODULES = (
    TiedHead,
    SharedLayer,
    TransposedTie,
    Frozen,
    WeightNormed,
    WeightNormedConv,
    SpectralNormed,
    UserParametrized,
)
