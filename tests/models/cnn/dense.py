"""One answer per pixel: U-Net, FCN; and ConvNeXt, whose norm runs over channels."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from models.cnn.blocks import Classifier, convolve


class UNet(nn.Module):
    """Ronneberger et al. 2015, upsampling by a transposed convolution followed by BatchNorm."""

    def __init__(self, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.enter = nn.Sequential(convolve(3, width, 3), convolve(width, width, 3))
        self.down = nn.Sequential(nn.MaxPool2d(2), convolve(width, 2 * width, 3))
        self.bottom = nn.Sequential(nn.MaxPool2d(2), convolve(2 * width, 4 * width, 3))
        self.up1 = _upsample(4 * width, 2 * width)
        self.join1 = convolve(4 * width, 2 * width, 3)
        self.up2 = _upsample(2 * width, width, groups=2)
        self.join2 = convolve(2 * width, width, 3)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine = self.enter(x)
        middle = self.down(fine)
        x = self.up1(self.bottom(middle))
        x = self.up2(self.join1(torch.cat([middle, x], 1)))
        return self.head(self.join2(torch.cat([fine, x], 1)))


def _upsample(channels: int, out: int, groups: int = 1) -> nn.Sequential:
    convolution = nn.ConvTranspose2d(channels, out, 2, stride=2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out))


class FCN(nn.Module):
    """Shelhamer et al. 2017 on a dilated trunk: scores are resized to the input bilinearly."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.trunk = nn.Sequential(convolve(3, 8, 3, 2), convolve(8, 16, 3, 2))
        self.dilated = nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(16, classes, 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = F.relu(self.norm(self.dilated(self.trunk(x))))
        scores = self.head(features)
        size = x.shape[-2:]
        return {"out": F.interpolate(scores, size=size, mode="bilinear", align_corners=False)}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(N, C, H, W)``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, linear MLP in channels-last, layer scale (Liu et al. 2022)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand, self.reduce = (
            nn.Linear(channels, 4 * channels),
            nn.Linear(4 * channels, channels),
        )
        self.scale = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        hidden = self.scale * self.reduce(F.gelu(self.expand(hidden)))
        return x + hidden.permute(0, 3, 1, 2)


def unet() -> nn.Module:
    return UNet()


def fcn() -> nn.Module:
    return FCN()


def convnext() -> nn.Module:
    stem = nn.Conv2d(3, 8, 4, stride=4)
    narrow = [ChannelNorm(8), nn.Conv2d(8, 16, 2, stride=2)]
    blocks = [ConvNeXtBlock(16), ConvNeXtBlock(16)]
    return nn.Sequential(stem, ChannelNorm(8), ConvNeXtBlock(8), *narrow, *blocks, Classifier(16))
