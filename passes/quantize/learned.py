"""Weights learned so that a part of a program gives what it gave with float ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from graphopt.kernels.quantized.learnable import Learnable

ROWS = 1024
"""Rows that a step sees, or more: samples are taken until they have as many, or all are."""


CHARGE = 25.0
"""What numbers are charged that are none of those that are stored, times the loss that the samples
of a step had at the start, if all of them are half way. Of 1, 5, 25 and 100 with speeds of 20, 60
and 150, this with 60 was best at 2 bits and second at 3."""

Forward = Callable[[int, Mapping[fx.Node, Tensor]], Sequence[Any]]
"""Outputs on a sample, by its number, with weights in place of those of the program."""


class Learned(NamedTuple):
    """Relative error of the outputs on all samples, before and after."""

    before: float
    after: float


class Reconstruction:
    """Learns weights together, by gradient descent.

    The loss is the squared error of each output, relative to its sum of squares over all samples.
    Each step sees some of the samples, in an order of its own; the rate falls from ``1 / steps`` to
    zero. What is kept is the best of where it started, where it ended, and the step whose loss was
    smallest beside the loss that its samples had at the start; that of a step says nothing where
    its weights were others than those that would be stored.

    Args:
        targets: outputs to come near to, sample by sample.
    """

    def __init__(
        self,
        forward: Forward,
        weights: Mapping[fx.Node, Learnable],
        targets: Sequence[Sequence[Any]],
        steps: int,
    ) -> None:
        self.forward, self.weights, self.steps = forward, weights, steps
        self.targets = targets
        self.floats = [i for i, t in enumerate(targets[0]) if _is_float(t)]
        self.sizes = [sum(_squared(row[i]) for row in targets) for i in self.floats]

    def learn(self) -> Learned:
        """Move the weights.

        Raises:
            ValueError: there is nothing that could be learned from; they are where they were.
            RuntimeError: an operator has no gradient.
        """
        if not self.floats or not all(0 < size < torch.inf for size in self.sizes):
            raise ValueError("its float outputs are none, zero or not finite")
        first, start = self._losses(), self._places()
        before = sum(first)
        if not 0 < before < torch.inf:
            return Learned(self._relative(before), self._relative(before))
        best, last = self._descend(first)
        reached = [(before, start)]
        for places in (best, last):
            self._move(places)
            reached.append((sum(self._losses()), places))
        after, places = min(reached, key=lambda r: r[0] if r[0] == r[0] else torch.inf)
        self._move(places)
        return Learned(self._relative(before), self._relative(after))

    def _descend(self, first: Sequence[float]) -> tuple[list[Any], list[Any]]:
        """Places of the best step, and behind the last one."""
        least, best = torch.inf, self._places()
        relaxed = any(weight.relaxed for weight in self.weights.values())
        for step, batch in zip(range(self.steps), self._batches(), strict=False):
            at_start = sum(first[i] for i in batch)
            lost = self._backward(batch)
            self._charge(CHARGE * at_start, step / self.steps)
            ratio = lost / at_start if at_start else torch.inf
            if ratio < least and not relaxed:
                least, best = ratio, self._places()
            rate = (1 - step / self.steps) / self.steps
            for weight in self.weights.values():
                weight.descend(rate)
        return best, self._places()

    def _backward(self, batch: Sequence[int]) -> float:
        """The loss on some samples; one at a time is held with what its gradient needs."""
        made = {node: weight.soft() for node, weight in self.weights.items()}
        leaves = {node: value.detach().requires_grad_() for node, value in made.items()}
        total = 0.0
        for index in batch:
            loss = self._loss(index, leaves)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        pairs = [(made[n], leaf.grad) for n, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])
        return total

    def _charge(self, most: float, progress: float) -> None:
        """Add the gradients of what weights are charged: ``most`` where all are half way."""
        charges = [weight.penalty(progress) for weight in self.weights.values()]
        known = [charge for charge in charges if charge is not None]
        if known:
            share = most / sum(weight.moves[0].numel() for weight in self.weights.values())
            (torch.stack(known).sum() * share).backward()  # type: ignore[no-untyped-call]

    def _loss(self, index: int, weights: Mapping[fx.Node, Tensor]) -> Tensor:
        outputs = self.forward(index, weights)
        losses = [
            (outputs[i].to(torch.float32) - self.targets[index][i]).square().sum() / size
            for i, size in zip(self.floats, self.sizes, strict=True)
        ]
        return torch.stack(losses).sum()

    def _losses(self) -> list[float]:
        with torch.no_grad():
            weights = {node: weight.read() for node, weight in self.weights.items()}
            return [float(self._loss(i, weights)) for i in range(len(self.targets))]

    def _batches(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(0)
        batch, rows = list[int](), 0
        while True:
            for index in torch.randperm(len(self.targets), generator=generator).tolist():
                target = self.targets[index][self.floats[0]]
                batch.append(index)
                rows += target.numel() // max(target.shape[-1] if target.dim() else 1, 1)
                if rows >= ROWS or len(batch) == len(self.targets):
                    yield batch
                    batch, rows = [], 0

    def _places(self) -> list[Any]:
        return [weight.places() for weight in self.weights.values()]

    def _move(self, places: Sequence[Any]) -> None:
        for weight, place in zip(self.weights.values(), places, strict=True):
            weight.move(place)

    def lost(self) -> float:
        """The relative error of the outputs on all samples, where the weights are."""
        return self._relative(sum(self._losses()))

    def _relative(self, loss: float) -> float:
        return float((loss / len(self.floats)) ** 0.5)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _squared(value: Tensor) -> float:
    return float(value.to(torch.float32).square().sum(dtype=torch.float64))
