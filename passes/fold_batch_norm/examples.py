"""Small networks with norms whose statistics differ per channel, for the rules' examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.rewrite import Example

Factory = Callable[[], nn.Module]

IMAGES = (2, 4, 9, 9)
ROWS = (5, 8)


def norm(channels: int, dims: int = 2, **options: Any) -> Factory:
    """A BatchNorm whose weight, bias and statistics are all off their initial values."""
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]

    def make() -> nn.Module:
        module = kind(channels, **options)
        with torch.no_grad():
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor.add_(0.5 * torch.randn(channels))
            if module.running_var is not None:
                module.running_var.add_(torch.rand(channels))
        return module

    return make


def stack(
    name: str,
    shape: Sequence[int],
    *layers: Factory,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Example:
    """Layers one after another, on a normal input of the given shape."""
    return Example(
        name,
        lambda: nn.Sequential(*(make() for make in layers)).to(dtype),
        lambda: (torch.randn(tuple(shape)).to(dtype),),
        **options,
    )


def network(
    name: str,
    shape: Sequence[int],
    function: Callable[..., Any],
    *layers: Factory,
    **options: Any,
) -> Example:
    """``function(x, *layers)``, for networks that are no chain."""
    return Example(
        name,
        lambda: Network(function, [make() for make in layers]),
        lambda: (torch.randn(tuple(shape)),),
        **options,
    )


def fine_tuned(name: str, shape: Sequence[int], *layers: Factory) -> Example:
    """Layers that train, around norms that keep their statistics."""
    return Example(
        name,
        lambda: FineTuned(*(make() for make in layers)),
        lambda: (torch.randn(tuple(shape)),),
        training=True,
    )


class FineTuned(nn.Sequential):
    """A chain whose norms stay in evaluation while the rest trains."""

    def train(self, mode: bool = True) -> FineTuned:
        super().train(mode)
        for layer in self:
            layer.train(mode and not isinstance(layer, nn.modules.batchnorm._BatchNorm))
        return self


class Network(nn.Module):
    """A function of the input and of layers that belong to the module."""

    def __init__(self, function: Callable[..., Any], layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.layers)
