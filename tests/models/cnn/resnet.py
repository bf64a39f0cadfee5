"""Residual networks: ResNet-18/50 (He et al. 2016) and RegNet (Radosavovic et al. 2020)."""

from __future__ import annotations

import torch
from torch import nn

from models.cnn.blocks import Classifier, SqueezeExcite, convolve


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; the stride sits on the 3x3 (the "v1.5" variant), which may be grouped."""

    expansion = 4

    def __init__(
        self, channels: int, width: int, stride: int = 1, groups: int = 1, gate: int = 0
    ) -> None:
        super().__init__()
        out = width * self.expansion
        self.reduce = convolve(channels, width)
        self.spatial = convolve(width, width, 3, stride, groups)
        self.gate = SqueezeExcite(width, gate) if gate else nn.Identity()
        self.expand = convolve(width, out, activation=None)
        self.downsample = _shortcut(channels, out, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.expand(self.gate(self.spatial(self.reduce(x))))
        return torch.relu_(out + self.downsample(x))


class XBlock(Bottleneck):
    """RegNet's block: no expansion, grouped 3x3, squeeze-excite (RegNetY)."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__(channels, width, stride, groups=width // 8, gate=channels // 4)


def _shortcut(channels: int, out: int, stride: int) -> nn.Module:
    if stride == 1 and channels == out:
        return nn.Identity()
    return convolve(channels, out, 1, stride, activation=None)


class ResNet(nn.Module):
    def __init__(
        self, block: type[nn.Module], depths: tuple[int, ...], widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *convolve(3, widths[0], 7, 2), nn.MaxPool2d(3, stride=2, padding=1)
        )
        channels, stages = widths[0], []
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for j in range(depth):
                stages.append(block(channels, width, stride=2 if i and not j else 1))
                channels = width * block.expansion
        self.stages = nn.Sequential(*stages)
        self.head = Classifier(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)))


def resnet18() -> nn.Module:
    return ResNet(BasicBlock, (2, 2, 2, 2), (8, 16, 24, 32))


def resnet50() -> nn.Module:
    return ResNet(Bottleneck, (3, 4, 6, 3), (4, 8, 12, 16))


def regnet() -> nn.Module:
    return ResNet(XBlock, (1, 2, 2), (8, 16, 32))
