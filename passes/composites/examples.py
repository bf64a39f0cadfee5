"""Functions as modules, for the rules' examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.rewrite import Example


class Call(nn.Module):
    """A function of the inputs, and of a weight and a bias of 8 features where it names them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, *tensors: Tensor) -> Any:
        code = self.function.__code__
        wanted = code.co_varnames[: code.co_argcount]
        own = {n: getattr(self, n) for n in ("weight", "bias") if n in wanted}
        return self.function(*tensors, **own)


def case(name: str, function: Callable[..., Any], *inputs: Any, **options: Any) -> Example:
    """An example whose inputs are given by shapes or makers; default: one ``(2, 5, 8)``."""
    given = inputs or ((2, 5, 8),)

    def make() -> tuple[Tensor, ...]:
        return tuple(i() if callable(i) else torch.randn(i) for i in given)

    return Example(name, lambda: Call(function), make, **options)


def half(*shape: int) -> Callable[[], Tensor]:
    """Maker of a bfloat16 tensor."""
    return lambda: torch.randn(shape).bfloat16()
