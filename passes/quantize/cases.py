"""Examples that differ in a function of one module and its input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.rewrite import Example

Function = Callable[[Any, Tensor], Any]
"""Of a module, which it reads weights of, and of an input."""


class Model(nn.Module):
    """Parameters, buffers and modules by name, and a function that reads them."""

    def __init__(self, held: Mapping[str, nn.Module | Tensor], function: Function) -> None:
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@dataclass(frozen=True)
class Cases:
    """Makes examples from functions.

    Attributes:
        held: makes what their modules hold.
        shape: of the input, where an example gives none.
    """

    held: Callable[[], Mapping[str, nn.Module | Tensor]]
    shape: tuple[int, ...]

    def model(self, function: Function, kind: torch.dtype = torch.float32) -> Model:
        return Model(self.held(), function).to(kind)

    def __call__(
        self,
        name: str,
        function: Function,
        *shape: int,
        kind: torch.dtype = torch.float32,
        **options: Any,
    ) -> Example:
        def inputs() -> tuple[Tensor]:
            return (torch.randn(shape or self.shape, dtype=kind),)

        return Example(name, lambda: self.model(function, kind), inputs, **options)
