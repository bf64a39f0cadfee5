"""Inverted residuals: MobileNetV2/V3, EfficientNet-B0; and ShuffleNetV2's channel shuffle."""

from __future__ import annotations

import torch
from torch import nn

from models.cnn.blocks import Activation, Classifier, SqueezeExcite, convolve


class InvertedResidual(nn.Module):
    """Expand by 1x1, depthwise, optional gate, linear projection (Sandler et al. 2018)."""

    def __init__(
        self,
        channels: int,
        out: int,
        expansion: int,
        kernel: int = 3,
        stride: int = 1,
        activation: Activation = nn.ReLU6,
        gate: Activation | None = None,
    ) -> None:
        super().__init__()
        hidden = channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(convolve(channels, hidden, activation=activation))
        layers.append(convolve(hidden, hidden, kernel, stride, hidden, activation))
        if gate:
            layers.append(SqueezeExcite(hidden, max(hidden // 4, 1), gate))
        layers.append(convolve(hidden, out, activation=None))
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and channels == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet_v2() -> nn.Module:
    return nn.Sequential(
        convolve(3, 8, 3, 2, activation=nn.ReLU6),
        InvertedResidual(8, 8, 1),
        InvertedResidual(8, 12, 4, stride=2),
        InvertedResidual(12, 12, 4),
        convolve(12, 32, activation=nn.ReLU6),
        Classifier(32, dropout=0.2),
    )


def mobilenet_v3() -> nn.Module:
    """Howard et al. 2019: hard-swish, squeeze-excite with a hard sigmoid, 5x5 depthwise."""
    return nn.Sequential(
        convolve(3, 8, 3, 2, activation=nn.Hardswish),
        InvertedResidual(8, 8, 1, activation=nn.ReLU, gate=nn.Hardsigmoid),
        InvertedResidual(8, 12, 3, 5, 2, nn.Hardswish, nn.Hardsigmoid),
        InvertedResidual(12, 12, 3, 5, 1, nn.Hardswish, nn.Hardsigmoid),
        convolve(12, 24, activation=nn.Hardswish),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 32),
        nn.Hardswish(),
        nn.Linear(32, 10),
    )


def efficientnet_b0() -> nn.Module:
    """Tan and Le 2019: SiLU everywhere, sigmoid gates."""
    return nn.Sequential(
        convolve(3, 8, 3, 2, activation=nn.SiLU),
        InvertedResidual(8, 8, 1, 3, 1, nn.SiLU, nn.Sigmoid),
        InvertedResidual(8, 12, 6, 3, 2, nn.SiLU, nn.Sigmoid),
        InvertedResidual(12, 12, 6, 5, 1, nn.SiLU, nn.Sigmoid),
        convolve(12, 32, activation=nn.SiLU),
        Classifier(32, dropout=0.2),
    )


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit (Ma et al. 2018): split, transform one half, interleave the channels."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        half = out // 2
        self.downsample = stride == 2
        incoming = channels if self.downsample else half
        self.left = nn.Sequential(
            convolve(channels, channels, 3, 2, channels, activation=None), convolve(channels, half)
        )
        self.right = nn.Sequential(
            convolve(incoming, half),
            convolve(half, half, 3, stride, half, activation=None),
            convolve(half, half),
        )
        if not self.downsample:
            self.left = nn.Sequential()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = (x, x) if self.downsample else x.chunk(2, dim=1)
        return shuffle(torch.cat((self.left(left), self.right(right)), dim=1), 2)


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Interleave ``groups`` equal runs of channels of ``(N, C, H, W)``."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


def shufflenet_v2() -> nn.Module:
    return nn.Sequential(
        convolve(3, 8, 3, 2),
        nn.MaxPool2d(3, 2, 1),
        ShuffleUnit(8, 16, 2),
        ShuffleUnit(16, 16, 1),
        convolve(16, 32),
        Classifier(32),
    )
