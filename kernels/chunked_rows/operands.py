"""What a call computes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.body import Body

T = TypeVar("T")
Other = TypeVar("Other")


@dataclass(frozen=True)
class Operands(Generic[T]):
    """``hidden (N, D)`` and ``weight (V, D)`` for each product, ``rows (N, ...)``, ``whole``."""

    hidden: Sequence[T]
    weight: Sequence[T]
    rows: Sequence[T]
    whole: Sequence[T]

    @property
    def all(self) -> list[T]:
        return [*self.hidden, *self.weight, *self.rows, *self.whole]

    @property
    def counts(self) -> list[int]:
        return [len(group) for group in (self.hidden, self.weight, self.rows, self.whole)]

    def filled(self, values: Iterable[Other]) -> Operands[Other]:
        """The same groups holding other values."""
        return grouped(values, self.counts)


def grouped(values: Iterable[T], counts: Sequence[int]) -> Operands[T]:
    """Values in groups of these sizes."""
    given = iter(values)
    return Operands(*([next(given) for _ in range(count)] for count in counts))


def check(
    operands: Operands[Tensor],
    body: Body,
    chunk_bytes: int,
    results: int,
    threshold: float = 0.0,
) -> None:
    """Refuse operands that are not those of the body.

    Sizes that are symbols are not compared: that would ask for their values.

    Args:
        results: how many results the caller expects of the body.

    Raises:
        ValueError: says what was found and what was expected.
    """
    products, weights, rows, whole = operands.counts
    if products != weights or not products:
        raise ValueError(f"{products} hidden and {weights} weight tensors; pairs are needed")
    if (taken := len(body.parameters)) != products + rows + whole:
        raise ValueError(
            f"the body takes {taken} tensors; there are {products} products, {rows} tensors of "
            f"rows and {whole} whole ones"
        )
    if (made := len(body.rows) + len(body.sums) + len(body.columns)) != results:
        raise ValueError(f"the body gives {made} results; `differentiable` names {results}")
    if chunk_bytes < 0:
        raise ValueError(f"chunk_bytes is {chunk_bytes}; give a size, or 0 for the default")
    if not 0 <= threshold < 1:
        raise ValueError(f"filter_threshold is {threshold}; give 0, or less than 1")
    _check_sizes(operands)


def _check_sizes(operands: Operands[Tensor]) -> None:
    for hidden, weight in zip(operands.hidden, operands.weight, strict=True):
        shapes = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        if hidden.dim() != 2 or weight.dim() != 2:
            raise ValueError(f"{shapes} are not matrices (N, D) and (V, D)")
        if _differ(hidden.shape[1], weight.shape[1]):
            raise ValueError(f"{shapes} differ in their columns")
    count = operands.hidden[0].shape[0]
    for tensor in (*operands.hidden, *operands.rows):
        if tensor.dim() == 0 or _differ(tensor.shape[0], count):
            shape = tuple(tensor.shape)
            raise ValueError(f"a tensor {shape} stands beside hidden, which has {count} rows")


def _differ(one: Any, other: Any) -> bool:
    return isinstance(one, int) and isinstance(other, int) and one != other


def part(operands: Operands[Tensor], span: slice) -> Operands[Tensor]:
    """The rows of one chunk."""
    hidden, rows = ([t[span] for t in group] for group in (operands.hidden, operands.rows))
    return Operands(hidden, operands.weight, rows, operands.whole)


def products(operands: Operands[Tensor]) -> list[Tensor]:
    return [h @ w.mT for h, w in zip(operands.hidden, operands.weight, strict=True)]


def cast(operands: Operands[Tensor], dtype: torch.dtype | None) -> Operands[Tensor]:
    """With the products' operands as autocast casts them: once, instead of in each chunk."""

    def low(tensor: Tensor) -> Tensor:
        exempt = tensor.dtype == torch.float64 or not tensor.is_floating_point()
        return tensor if exempt else tensor.to(dtype)

    if dtype is None:
        return operands
    hidden, weight = map(low, operands.hidden), map(low, operands.weight)
    return Operands(list(hidden), list(weight), operands.rows, operands.whole)
