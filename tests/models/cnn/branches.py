"""Networks whose layers run side by side: GoogLeNet, Inception v3, DenseNet."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from models.cnn.blocks import Classifier, convolve


class Inception(nn.Module):
    """Four branches joined along channels (Szegedy et al. 2015)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.one = convolve(channels, width)
        self.three = nn.Sequential(convolve(channels, width), convolve(width, width, 3))
        self.five = nn.Sequential(convolve(channels, width), convolve(width, width, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), convolve(channels, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class Factorized(nn.Module):
    """Inception v3's block: 1x5 after 5x1 (Szegedy et al. 2016), a branch that splits in two."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter = convolve(channels, width)
        self.tall = nn.Conv2d(width, width, (5, 1), padding=(2, 0), bias=False)
        self.wide = nn.Conv2d(width, width, (1, 5), padding=(0, 2), bias=False)
        self.tall_norm = nn.BatchNorm2d(width, eps=1e-3)
        self.wide_norm = nn.BatchNorm2d(width, eps=1e-3)
        self.pooled = convolve(channels, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        entered = self.enter(x)
        tall = F.relu(self.tall_norm(self.tall(entered)), inplace=True)
        wide = F.relu(self.wide_norm(self.wide(entered)), inplace=True)
        pooled = self.pooled(F.avg_pool2d(x, 3, 1, 1))
        return torch.cat([torch.cat([tall, wide], 1), pooled], 1)


class GoogLeNet(nn.Module):
    """With the auxiliary classifier that is computed in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(convolve(3, 8, 7, 2), nn.MaxPool2d(3, 2, ceil_mode=True))
        self.first, self.second = Inception(8, 4), Inception(16, 6)
        self.auxiliary = Classifier(16)
        self.head = Classifier(24, dropout=0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = self.first(self.stem(x))
        out = self.head(self.second(x))
        return (out, self.auxiliary(x)) if self.training else out


class DenseLayer(nn.Module):
    """Norm and activation first, convolution after; reads all that came before it."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 2 * growth, 1)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        hidden = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(hidden)))


class DenseNet(nn.Module):
    """Huang et al. 2017."""

    def __init__(self, growth: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.stem = convolve(3, 8, 3, 2)
        self.layers = nn.ModuleList(DenseLayer(8 + i * growth, growth) for i in range(depth))
        channels = 8 + depth * growth
        self.norm = nn.BatchNorm2d(channels)
        self.head = Classifier(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(F.relu(self.norm(torch.cat(features, 1))))


def googlenet() -> nn.Module:
    return GoogLeNet()


def inception_v3() -> nn.Module:
    return nn.Sequential(
        convolve(3, 8, 3, 2), Factorized(8, 6), nn.MaxPool2d(2), Factorized(18, 6), Classifier(18)
    )


def densenet() -> nn.Module:
    return DenseNet()
