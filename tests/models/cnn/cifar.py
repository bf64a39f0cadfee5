"""CIFAR-10 ResNets (He et al. 2016, section 4.2) under the names of the published weights.

The files hold ``{"state_dict": {"module.conv1.weight": ...}, "best_prec1": ...}``: the ``module.``
in front of every name is what ``torch.nn.DataParallel`` leaves behind.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

PREFIX = "module."
# Per-channel statistics of the CIFAR-10 training set that the published weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; a shortcut without parameters ("option A": stride, zero channels)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.grow = (width - channels) // 2
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        if self.stride == 1 and self.grow == 0:
            return x
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, self.grow, self.grow), "constant", 0)


class CifarResNet(nn.Module):
    """``(N, 3, 32, 32)`` to ``(N, 10)``; ``6 * depth + 2`` layers with weights."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, depth, 1)
        self.layer2 = _stage(16, 32, depth, 2)
        self.layer3 = _stage(32, 64, depth, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, out.size()[3])
        return self.linear(out.view(out.size(0), -1))


def _stage(channels: int, width: int, depth: int, stride: int) -> nn.Sequential:
    blocks = [CifarBlock(channels, width, stride)]
    return nn.Sequential(*blocks, *(CifarBlock(width, width, 1) for _ in range(depth - 1)))


def resnet20() -> CifarResNet:
    return CifarResNet(3)


def resnet56() -> CifarResNet:
    return CifarResNet(9)


def load_published(model: CifarResNet, path: Path) -> CifarResNet:
    """Load one of the published files into ``model``, which is returned in eval mode."""
    states = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix(PREFIX): value for name, value in states.items()})
    return model.eval()


def cifar_images(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``count`` test images, normalised ``(N, 3, 32, 32)``, and labels ``(N,)``.

    Needs NumPy and Pillow.
    """
    import io

    import numpy as np
    from PIL import Image

    with np.load(folder / "images" / "cifar10-test.npz") as data:
        jpeg, offset, labels = data["jpeg"], data["offset"], data["label"][:count]
    files = [jpeg[offset[i] : offset[i + 1]].tobytes() for i in range(len(labels))]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (scaled - mean) / std, torch.from_numpy(labels.astype(np.int64))
