"""Query, key and value as attention reads them, looked for behind transposes and selections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphopt.onnx_files.numbers import axes, constant, entries, is_standard, number, size, width

TOKENS, HEADS = "BSHD", "BHSD"
"""Batch, tokens, heads, head's elements: with tokens or with heads in front of the other."""
SWAPPED = (0, 2, 1, 3)
"""The transposition from either to the other."""


@dataclass(frozen=True)
class Operand:
    """One of query, key and value.

    Attributes:
        value: in four axes; in three, batch or heads in one, where ``order`` is ``"NSD"``.
        order: `TOKENS` or `HEADS`.
        picked: where it is one of several in ``value`` ``(B, S, n, H, D)``, which; None elsewhere.
        factor: what it is multiplied by.
    """

    value: Any
    order: str = HEADS
    picked: int | None = None
    factor: float = 1.0

    @property
    def heads(self) -> int | None:
        """How many heads it has; None where that is not known."""
        axis = {TOKENS: 2, HEADS: 1}.get(self.order)
        if axis is None:
            return 1
        found = size(self.value, 3 if self.picked is not None else axis)
        if isinstance(found, int):
            return found if found > 0 else None
        return _heads_left(self.value) if self.order == TOKENS and self.picked is None else None

    def size(self, letter: str) -> Any:
        """The length of one of its axes, as far as it is known."""
        order = "BSnHD" if self.picked is not None else self.order
        return size(self.value, order.index(letter))


def _heads_left(value: Any) -> int | None:
    """Heads of ``(B, S, -1, D)``: the width of what is reshaped, in parts of ``D``."""
    node = value.producer()
    given = entries(node.inputs[1]) if is_standard(node, "Reshape") else None
    if given is None or len(given) != 4 or given[2] != -1:
        return None
    whole, each = width(node.inputs[0]), given[3]
    fits = isinstance(each, int) and each > 0 and whole is not None and whole % each == 0
    return whole // each if fits and whole is not None and isinstance(each, int) else None


def perm_of(value: Any) -> tuple[int, ...] | None:
    """The order in which a value has its producer's axes; None where that is no transpose."""
    node = value.producer()
    if not is_standard(node, "Transpose") or "perm" not in node.attributes:
        return None
    return tuple(node.attributes["perm"].as_ints())


def source(value: Any, index: int = 0) -> Any:
    return value.producer().inputs[index]


def scaled(value: Any) -> tuple[Any, float]:
    """A value without products and quotients with one number, and what they come to."""
    factor = 1.0
    while is_standard(node := value.producer(), "Mul", "Div"):
        found = [number(v) for v in node.inputs]
        if found[1] is not None and found[0] is None:
            factor, value = times(factor, found[1], node.op_type), node.inputs[0]
        elif found[0] is not None and found[1] is None and node.op_type == "Mul":
            factor, value = factor * found[0], node.inputs[1]
        else:
            break
    return value, factor


def times(factor: float, other: float, kind: str) -> float:
    """A factor after ``Mul`` or ``Div`` by another; NaN after division by zero."""
    if kind == "Mul":
        return factor * other
    return factor / other if other else float("nan")


def query_of(value: Any, rank: int) -> Operand:
    plain, factor = scaled(value)
    return _placed(Operand(plain, HEADS if rank == 4 else "NSD", factor=factor))


def key_of(value: Any, rank: int) -> Operand | None:
    """The key of its transpose; None where there is no transpose."""
    plain, factor = scaled(value)
    perm = perm_of(plain)
    if perm == (0, 2, 3, 1):
        return Operand(source(plain), TOKENS, factor=factor)
    if perm == ((0, 1, 3, 2) if rank == 4 else (0, 2, 1)):
        found = query_of(source(plain), rank)
    elif (whole := _flattened(plain)) is not None:
        found = query_of(whole, rank)
    else:
        return None
    return replace(found, factor=found.factor * factor)


def value_of(value: Any, rank: int) -> Operand:
    return _placed(Operand(value, HEADS if rank == 4 else "NSD"))


def _flattened(value: Any) -> Any | None:
    """What torch's exporter transposes with batch and heads as one axis: ``(B, H, S, D)``."""
    last = value.producer()
    if not is_standard(last, "Reshape") or perm_of(last.inputs[0]) != (0, 2, 1):
        return None
    first = source(last.inputs[0]).producer()
    if not is_standard(first, "Reshape"):
        return None
    whole = first.inputs[0]
    if perm_of(whole) != SWAPPED and (whole.shape is None or len(whole.shape) != 4):
        return None
    b, h, s, d = (size(whole, axis) for axis in range(4))
    joined, apart = entries(first.inputs[1]), entries(last.inputs[1])
    fits = joined is not None and joined[0] == -1 and joined[1:] == [s, d]
    return whole if fits and apart == [b, h, d, s] else None


def _placed(operand: Operand) -> Operand:
    """Tokens before heads, where the value was that and was transposed."""
    if operand.order != HEADS:
        return operand
    if perm_of(operand.value) == SWAPPED:
        plain, factor = scaled(source(operand.value))
        return replace(operand, value=plain, order=TOKENS, factor=operand.factor * factor)
    return _selected(operand) or operand


def _selected(operand: Operand) -> Operand | None:
    """One of query, key and value that were transposed together: ``(n, B, H, S, D)``."""
    node = operand.value.producer()
    if is_standard(node, "Gather") and node.attributes.get_int("axis", 0) == 0:
        index = constant(node.inputs[1])
        place = int(index.item()) if index is not None and index.ndim == 0 else None
    elif is_standard(node, "Squeeze") and axes(node) == [0]:
        node = node.inputs[0].producer()
        place = _place(node, operand.value.producer().inputs[0])
    else:
        return None
    if place is None or place < 0 or perm_of(node.inputs[0]) != (2, 0, 3, 1, 4):
        return None
    return replace(operand, value=source(node.inputs[0]), order=TOKENS, picked=place)


def _place(node: Any, taken: Any) -> int | None:
    """Which one a slice or a split takes of the first axis."""
    if is_standard(node, "Slice"):
        first, last, along = (constant(v) for v in (*node.inputs[1:4], None)[:3])
        given = (first, last) if along is None else (first, last, along)
        if any(a is None or a.size != 1 for a in given) or len(node.inputs) > 5:
            return None
        start, end = int(first.item()), int(last.item())
        whole = along is None or int(along.item()) == 0
        return start if whole and end == start + 1 and _is_one_step(node) else None
    if is_standard(node, "Split") and node.attributes.get_int("axis", 0) == 0:
        return list(node.outputs).index(taken) if _is_even(node) else None
    return None


def _is_one_step(node: Any) -> bool:
    step = constant(node.inputs[4]) if len(node.inputs) > 4 else None
    return len(node.inputs) < 5 or (step is not None and step.size == 1 and int(step.item()) == 1)


def _is_even(node: Any) -> bool:
    """Whether each part of a split is one long."""
    parts: Sequence[Any] | None = [1] * len(node.outputs)
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return entries(node.inputs[1]) == parts
    if "split" in node.attributes:
        return list(node.attributes["split"].as_ints()) == parts
    return size(node.inputs[0], 0) == len(node.outputs)
