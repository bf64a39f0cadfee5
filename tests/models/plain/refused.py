"""Modules that no whole-graph capture can take: each must be refused with one cause."""

from __future__ import annotations

import torch
from torch import nn


class BranchOnData(nn.Module):
    """Which layer runs depends on a value in the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.yes(x) if x.sum() > 0 else self.no(x)


class LoopOnData(nn.Module):
    """How often the layer runs depends on a value in the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(int(x.abs().max().item())):
            x = torch.tanh(self.linear(x))
        return x


class ThroughNumpy(nn.Module):
    """Leaves torch in the middle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_numpy(x.detach().numpy().cumsum(-1))


class UnknownOutput(nn.Module):
    """Returns an object that torch cannot take apart."""

    class Result:
        def __init__(self, value: torch.Tensor) -> None:
            self.value = value

    def forward(self, x: torch.Tensor) -> UnknownOutput.Result:
        return self.Result(x * 2)


class Crashes(nn.Module):
    """Wrong for everyone: the shapes do not fit, captured or not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


MODULES = (BranchOnData, LoopOnData, ThroughNumpy, UnknownOutput, Crashes)
