"""Unusual ways in and out: dicts, dataclasses, named tuples, keyword-only arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree


@dataclass
class Batch:
    """A dataclass that torch knows how to take apart, as inputs and outputs must be."""

    values: torch.Tensor
    weights: torch.Tensor


pytree.register_dataclass(Batch)


class Moments(NamedTuple):
    mean: torch.Tensor
    spread: torch.Tensor


class DictInOut(nn.Module):
    """A dict of inputs to a nested dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, Any]:
        hidden = self.linear(features["left"]) + features["right"]
        return {"hidden": hidden, "stats": {"mean": hidden.mean(-1), "max": hidden.amax(-1)}}


class DataclassInOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, batch: Batch) -> Batch:
        return Batch(self.linear(batch.values) * batch.weights, batch.weights)


class NamedTupleOut(nn.Module):
    def forward(self, x: torch.Tensor) -> Moments:
        return Moments(x.mean(-1), x.std(-1))


class KeywordOnly(nn.Module):
    """Keyword-only arguments, one of them optional, one no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(
        self,
        x: torch.Tensor,
        *,
        scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        power: int = 2,
    ) -> torch.Tensor:
        out = self.linear(x) * scale
        return out**power if bias is None else out**power + bias


class ListInOut(nn.Module):
    """A list of tensors to a list of the same length, ``None`` at the end."""

    def forward(self, tensors: list[torch.Tensor]) -> list[torch.Tensor | None]:
        return [*(tensor.exp() for tensor in tensors), None]


class RepeatedOutput(nn.Module):
    """The same tensor twice, an input handed back, a parameter, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        out = self.linear(x)
        return out, out, x, self.linear.bias, 3


class UnusedInput(nn.Module):
    """One argument is ignored, and one parameter is never read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, ignored: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class LogitsAndLoss(nn.Module):
    """Returns the loss of a linear head and the logits themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 29, bias=False)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.head(torch.relu(self.body(x)))
        loss = nn.functional.cross_entropy(logits.view(-1, 29), targets.view(-1))
        return loss, logits


MODULES = (
    DictInOut,
    DataclassInOut,
    NamedTupleOut,
    KeywordOnly,
    ListInOut,
    RepeatedOutput,
    UnusedInput,
    LogitsAndLoss,
)
