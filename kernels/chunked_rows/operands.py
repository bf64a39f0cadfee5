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
    """``hidden (N, D)`` and ``weight (V, D)`` for each product, ``rows (N, ...)``, ``whole``.

    A weight ``(G, V, D)`` is G matrices: a row of hidden is G rows of a body, one after the other,
    and ``rows`` are ``(N * G, ...)``.
    """

    hidden: Sequence[T]
    weight: Sequence[T]
    rows: Sequence[T]
    whole: Sequence[T]

    @property
    def all(self) -> list[T]:
        return [*self.hidden, *self.weight, *self.rows, *self.whole]

    @property
    def groups(self: Operands[Tensor]) -> int:
        """Rows of a body for each row of hidden."""
        first = self.weight[0]
        return int(first.shape[0]) if first.dim() == 3 else 1

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
        if hidden.dim() != 2 or weight.dim() not in (2, 3):
            raise ValueError(f"{shapes} are not matrices (N, D) and (V, D), or some of these")
        if _differ(hidden.shape[1], weight.shape[-1]):
            raise ValueError(f"{shapes} differ in their columns")
    count, groups = operands.hidden[0].shape[0], operands.groups
    if any(weight.shape[:-2] != operands.weight[0].shape[:-2] for weight in operands.weight):
        raise ValueError(f"weights {[tuple(w.shape) for w in operands.weight]} differ in number")
    for tensor in operands.hidden:
        _check_count(tensor, count, f"hidden, which has {count} rows")
    for tensor in operands.rows:
        each = f", {groups} for each" if groups > 1 else ""
        _check_count(tensor, count * groups, f"hidden, which has {count} rows{each}")


def _check_count(tensor: Tensor, count: Any, beside: str) -> None:
    if tensor.dim() == 0 or _differ(tensor.shape[0], count):
        raise ValueError(f"a tensor {tuple(tensor.shape)} stands beside {beside}")


def _differ(one: Any, other: Any) -> bool:
    return isinstance(one, int) and isinstance(other, int) and one != other


def autocast_of(tensor: Tensor) -> torch.dtype | None:
    """The dtype of the autocast region that is open for a tensor's device."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def may_name_classes(operands: Operands[Tensor]) -> bool:
    """Whether some tensor on a CPU holds integers, which may be no class.

    Operators raise an error there. Inductor's code checks indices too, but an error on one of its
    threads ends the process.
    """
    given = (t for t in (*operands.rows, *operands.whole) if t.device.type == "cpu")
    return any(not t.is_floating_point() and t.dtype != torch.bool for t in given)


def part(operands: Operands[Tensor], span: slice) -> Operands[Tensor]:
    """Some rows of hidden, and what belongs to them."""
    inner = of_body(span, operands.groups)
    hidden, rows = [h[span] for h in operands.hidden], [r[inner] for r in operands.rows]
    return Operands(hidden, operands.weight, rows, operands.whole)


def few(operands: Operands[Tensor]) -> Operands[Tensor]:
    """The same with two rows, which hold anything."""
    count = 2 * operands.groups
    hidden = [h.new_empty((2, *h.shape[1:])) for h in operands.hidden]
    rows = [r.new_empty((count, *r.shape[1:])) for r in operands.rows]
    return Operands(hidden, operands.weight, rows, operands.whole)


def of_body(span: slice, groups: int) -> slice:
    """The rows of a body for some rows of hidden."""
    return slice(span.start * groups, span.stop * groups)


def all_classes(weight: Tensor) -> Tensor:
    """All classes of a weight, ``(G * V, D)``; a view where they lie one after the other."""
    return weight.flatten(0, 1) if weight.dim() == 3 else weight


def products(operands: Operands[Tensor]) -> list[Tensor]:
    """``(N * G, V)`` each."""
    pairs = zip(operands.hidden, operands.weight, strict=True)
    return [split(h @ all_classes(w).mT, w) for h, w in pairs]


def split(product: Tensor, weight: Tensor) -> Tensor:
    """The rows of a body, of a product with all classes of a weight."""
    if weight.dim() == 2:
        return product
    groups, classes, _ = weight.shape
    return product.reshape(product.shape[0] * groups, classes)


def cast(operands: Operands[Tensor], dtype: torch.dtype | None) -> Operands[Tensor]:
    """With the products' operands as autocast casts them: once, instead of in each chunk.

    Several matrices of a weight are laid out one after the other.
    """

    def low(tensor: Tensor) -> Tensor:
        exempt = tensor.dtype == torch.float64 or not tensor.is_floating_point()
        return tensor if exempt else tensor.to(dtype)

    hidden, weight = operands.hidden, operands.weight
    if dtype is not None:
        hidden, weight = [low(h) for h in hidden], [low(w) for w in weight]
    weight = [w.contiguous() if w.dim() == 3 else w for w in weight]
    return Operands(hidden, weight, operands.rows, operands.whole)
