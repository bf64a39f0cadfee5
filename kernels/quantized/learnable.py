"""What can be learned of a quantized weight: tensors that move along gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.kernels.quantized.weight import QuantizedWeight


class Learnable(ABC):
    """Numbers as a function of tensors that move.

    Attributes:
        moves: those tensors; they require gradients.
        relaxed: whether `soft` gives other numbers than `read`.
    """

    relaxed: ClassVar[bool] = False
    moves: list[Tensor]

    @abstractmethod
    def read(self) -> Tensor:
        """The numbers as they will be read back, float32; of a weight ``(N, K)``."""

    def soft(self) -> Tensor:
        """The numbers that gradients are taken at, differentiable: those of `read`, or near."""
        return self.read()

    def penalty(self, progress: float) -> Tensor | None:  # noqa: ARG002
        """What `soft` is charged for numbers that are none of `read`, a sum over all of them.

        Args:
            progress: the share of the steps that were made, from 0 to 1.
        """
        return None

    @abstractmethod
    def descend(self, rate: float) -> None:
        """Move along the gradients, and forget these; rates of all steps sum up to about 1/2."""

    def places(self) -> list[Tensor]:
        """Where everything that moves is, copied."""
        return [moved.detach().clone() for moved in self.moves]

    def move(self, places: list[Tensor]) -> None:
        """Back to `places`."""
        with torch.no_grad():
            for moved, place in zip(self.moves, places, strict=True):
                moved.copy_(place)


class LearnableWeight(Learnable):
    """Of a weight."""

    @abstractmethod
    def stored(self) -> QuantizedWeight:
        """The quantized weight."""


class Adam:
    """Steps along gradients of equal size for all that moves (Kingma & Ba 2015, "Adam").

    Args:
        speeds: what a rate is multiplied by for each of `moves`.
    """

    FIRST, SECOND = 0.9, 0.95
    """Decay of the mean gradient and of its mean square, over steps that are few."""

    def __init__(self, moves: Sequence[Tensor], speeds: Sequence[float]) -> None:
        self.moves, self.speeds = moves, speeds
        self.means = [torch.zeros(2, *m.shape, device=m.device) for m in moves]
        self.count = 0

    def step(self, rate: float) -> None:
        """One step; gradients are forgotten."""
        self.count += 1
        first_share, second_share = (1 - d**self.count for d in (self.FIRST, self.SECOND))
        with torch.no_grad():
            for moved, (first, second), speed in zip(
                self.moves, self.means, self.speeds, strict=True
            ):
                if moved.grad is not None:
                    first.lerp_(moved.grad, 1 - self.FIRST)
                    second.lerp_(moved.grad.square(), 1 - self.SECOND)
                    size = (second / second_share).sqrt_()
                    size += torch.finfo(torch.float32).tiny
                    moved.addcdiv_(first, size, value=-rate * speed / first_share)
                    moved.grad = None
