"""Modules that write in place: to intermediates, through views, to their buffers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class InplaceRelu(nn.Module):
    """``relu_`` on a linear's output, then a skip from *after* the write."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x)
        rectified = F.relu(hidden, inplace=True)
        return hidden + 2 * rectified


class ReadBeforeWrite(nn.Module):
    """A product read *before* a write and one after it: the two must not be merged or moved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x)
        before = hidden * 2
        hidden.add_(1)
        after = hidden * 2
        return before + after


class WriteThroughView(nn.Module):
    """The write goes through a transposed slice; the read through the base."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x)
        total = hidden.sum(-1, keepdim=True)
        hidden.transpose(-1, -2)[..., :4, :].mul_(0.5)
        return hidden + total


class IndexedWrite(nn.Module):
    """``out[..., i] = value`` into a fresh tensor, and a masked write."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        out[..., 0] = x[..., 1]
        out[..., 1:] = x[..., :-1] * 3
        out[x > 1] = 0.25
        return out


class RunningMean(nn.Module):
    """An exponential average and a step counter kept in buffers, updated by every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.steps.add_(1)
            self.average.mul_(0.9).add_(x.mean(dim=tuple(range(x.ndim - 1))), alpha=0.1)
        return x - self.average / (1 - 0.9**self.steps)


class RollingState(nn.Module):
    """The buffer read is the one of the call before; the write replaces it whole."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("state", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.linear(x) + self.state
        self.state.copy_(out.detach().mean(dim=tuple(range(out.ndim - 1))))
        return out


class InputWrite(nn.Module):
    """Writes to the caller's tensor, which must see it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return x + 1


class NormedBatch(nn.Module):
    """BatchNorm over features between linears: in training its statistics move."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.enter(x).flatten(0, -2))
        return self.leave(torch.relu_(hidden)).view(x.shape)


MODULES = (
    InplaceRelu,
    ReadBeforeWrite,
    WriteThroughView,
    IndexedWrite,
    RunningMean,
    RollingState,
    InputWrite,
    NormedBatch,
)
