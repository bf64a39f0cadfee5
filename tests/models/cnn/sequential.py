"""Feed-forward stacks: VGG with BatchNorm (Simonyan 2015), SqueezeNet (Iandola et al. 2016)."""

from __future__ import annotations

import torch
from torch import nn

from models.cnn.blocks import convolve


class VGG(nn.Module):
    """Convolutions *with* bias before BatchNorm, as VGG-BN has them; ``None`` in the plan pools."""

    def __init__(self, plan: tuple[int | None, ...], classes: int = 10) -> None:
        super().__init__()
        layers, channels = [], 3
        for width in plan:
            if width is None:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        hidden = [nn.Linear(channels * 4, 32), nn.BatchNorm1d(32), nn.ReLU(True), nn.Dropout()]
        self.classifier = nn.Sequential(*hidden, nn.Linear(32, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class Fire(nn.Module):
    """Squeeze by 1x1, expand by 1x1 and 3x3 side by side."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.squeeze(x))
        return torch.cat([self.relu(self.expand1x1(x)), self.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            Fire(8, 4, 8),
            Fire(16, 4, 8),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            Fire(16, 8, 16),
        )
        self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(32, classes, 1), nn.ReLU(True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x)).mean((-2, -1))


class NormFirst(nn.Module):
    """BatchNorm *before* the convolution or linear, also before padding, grouped and 1-D."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=4)
        self.norm3, self.conv3 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.norm4, self.head = nn.BatchNorm1d(8), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        # Zero padding after a norm is not zero before it: this fold is only right inside.
        x = self.conv3(self.norm3(x))
        return self.head(self.norm4(x.mean((2, 3))))


def vgg() -> nn.Module:
    return VGG((8, None, 16, None, 16, 16, None))


def squeezenet() -> nn.Module:
    return SqueezeNet()


def norm_first() -> nn.Module:
    return NormFirst()


def plain_stack() -> nn.Module:
    """No branches at all: three convolutions with BatchNorm, then a linear with BatchNorm."""
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10), nn.BatchNorm1d(10)]
    return nn.Sequential(
        *convolve(3, 8, 3), *convolve(8, 8, 3, 2, 8), *convolve(8, 16, 1, activation=None), *head
    )
