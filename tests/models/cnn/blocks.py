"""Pieces that several convolutional networks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Activation = Callable[[], nn.Module]


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def convolve(
    channels: int,
    out: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: Activation | None = relu,
) -> nn.Sequential:
    """Convolution without bias, BatchNorm, activation; "same" padding for odd kernels."""
    padding = (kernel - 1) // 2
    layers: list[nn.Module] = [
        nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


class SqueezeExcite(nn.Module):
    """Channel gate from the globally averaged image (Hu et al. 2018)."""

    def __init__(self, channels: int, hidden: int, gate: Activation = nn.Sigmoid) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.gate = gate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.expand(torch.relu(self.reduce(self.pool(x))))
        return x * self.gate(scale)


class Classifier(nn.Sequential):
    """Global average, dropout, linear: ``(N, C, H, W)`` to ``(N, classes)``."""

    def __init__(self, channels: int, classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(channels, classes),
        )
