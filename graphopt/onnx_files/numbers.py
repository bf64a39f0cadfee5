"""What is known of small values without running a model: sizes in shapes, and single numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from graphopt.onnx_files.random_nodes import STANDARD

Entry = int | tuple[str, str | int]
"""A number, or what it is equal to: a named axis, an axis of a value, or an element of a value."""
_SIZES, _MASKS = 64, 1 << 20
"""Elements of constants that are looked at: of sizes and numbers, and of what may be all the same.
"""
_COPIES = frozenset({"Identity", "Cast", "Squeeze", "Unsqueeze"})
_UNARY: dict[str, Callable[[float], float]] = {
    "Sqrt": math.sqrt,
    "Reciprocal": lambda x: 1 / x,
    "Neg": operator.neg,
}
_BINARY: dict[str, Callable[[float, float], float]] = {
    "Mul": operator.mul,
    "Div": operator.truediv,
    "Pow": operator.pow,
}


def is_standard(node: Any, *operators: str) -> bool:
    """Whether a node is one of these operators of ONNX; false for None."""
    return node is not None and node.domain in STANDARD and node.op_type in operators


def held_tensor(value: Any) -> Any:
    """The tensor of an initializer that nobody overrides, or of ``Constant``; None for others."""
    import onnx_ir

    node = value.producer()
    if node is None:
        fixed = value.is_initializer() and not value.is_graph_input()
        return value.const_value if fixed else None
    is_constant = is_standard(node, "Constant")
    return onnx_ir.convenience.get_const_tensor(value) if is_constant else None


def constant(value: Any, largest: int = _SIZES) -> Any:
    """The array of a small tensor that is `held_tensor`; None for anything else."""
    import onnx_ir

    tensor = None if value is None else held_tensor(value)
    if tensor is None or tensor.size > largest or tensor.dtype == onnx_ir.DataType.STRING:
        return None
    return tensor.numpy()


def axes(node: Any, index: int = 1) -> list[int] | None:
    """Axes that a node is given as an attribute or as a constant input."""
    if (given := node.attributes.get("axes")) is not None:
        return list(given.as_ints())
    found = constant(node.inputs[index]) if len(node.inputs) > index else None
    return None if found is None else [int(n) for n in found.reshape(-1)]


def size(value: Any, axis: int) -> Entry:
    """How long an axis of a value is: a number, or what names it."""
    if value.shape is not None and -len(value.shape) <= axis < len(value.shape):
        axis %= len(value.shape)
        dim = value.shape[axis]
        if isinstance(dim, int):
            return dim
        if axis == len(value.shape) - 1 and (found := width(value)) is not None:
            return found
        if dim.value is not None:
            return ("", str(dim.value))
    if is_standard(node := value.producer(), "Reshape"):
        given = entries(node.inputs[1])
        if given is not None and 0 <= axis < len(given) and given[axis] not in (0, -1):
            return given[axis]
    return (str(value.name), axis)


def width(value: Any, left: int = 8) -> int | None:
    """The length of the last axis, by the weights and biases that a value comes of."""
    if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int):
        return int(value.shape[-1])
    node = value.producer()
    if left == 0 or not is_standard(node, "MatMul", "Add", "LayerNormalization", "Reshape"):
        return None
    if node.op_type == "Reshape":
        last = (entries(node.inputs[1]) or [-1])[-1]
        return last if isinstance(last, int) and last > 0 else None
    if node.op_type == "Add":  # lengths above 1 are equal
        found = (width(v, left - 1) for v in node.inputs)
        return next((n for n in found if n is not None and n > 1), None)
    given = node.inputs[1]
    if node.op_type == "MatMul":
        plain = given.shape is not None and len(given.shape) > 1
        return width(given, left - 1) if plain else None
    return width(given, left - 1)


def entries(value: Any) -> list[Entry] | None:
    """The elements of a vector of sizes, or of a single one; None where their number is unknown."""
    found = constant(value)
    if found is not None:
        return [int(n) for n in found.reshape(-1)] if found.dtype.kind in "iu" else None
    node = value.producer()
    if is_standard(node, "Shape"):
        return _shape(node)
    if is_standard(node, "Concat"):
        parts = [entries(v) for v in node.inputs]
        return None if None in parts else [e for part in parts if part for e in part]
    if is_standard(node, "Gather", "Slice") and (picked := _picked(node)) is not None:
        return picked
    if is_standard(node, *_COPIES):
        return entries(node.inputs[0])
    if is_standard(node, *_UNARY, *_BINARY) and (single := number(value)) is not None:
        return [int(single)] if single.is_integer() else None
    known = value.shape is not None and all(n == 1 for n in value.shape)
    return [(str(value.name), 0)] if known else None


def _shape(node: Any) -> list[Entry] | None:
    given = node.inputs[0]
    if given.shape is None:
        return None
    start = node.attributes.get_int("start", 0)
    every = [size(given, axis) for axis in range(len(given.shape))]
    return every[start : node.attributes.get_int("end", len(every))]


def _picked(node: Any) -> list[Entry] | None:
    """Elements that a node takes out of a vector of sizes."""
    if node.op_type == "Gather":
        index = constant(node.inputs[1])
        if index is None:
            return None
        places = [int(n) for n in index.reshape(-1)]
        source = node.inputs[0].producer()
        if is_standard(source, "Shape") and source.inputs[0].shape is None and min(places) >= 0:
            start = source.attributes.get_int("start", 0)
            return [size(source.inputs[0], start + n) for n in places]
        every = entries(node.inputs[0])
        fits = every is not None and all(-len(every) <= n < len(every) for n in places)
        return [every[n] for n in places] if fits and every is not None else None
    every, bounds = entries(node.inputs[0]), [constant(v) for v in node.inputs[1:]]
    plain = len(node.inputs) > 2 and all(b is not None and b.size == 1 for b in bounds)
    if every is None or not plain:
        return None
    step = int(bounds[3].item()) if len(bounds) > 3 else 1
    return every[int(bounds[0].item()) : int(bounds[1].item())] if step == 1 else None


def number(value: Any) -> float | None:
    """The one number that a value holds, where that follows from constants and static sizes."""
    found = _number(value)
    if found is None or found.is_integer():
        return found
    fractional = value.dtype is not None and value.dtype.is_floating_point()
    return found if fractional else None  # integers are divided and cast towards zero


def _number(value: Any) -> float | None:
    found = constant(value)
    if found is not None:
        return float(found.reshape(-1)[0]) if found.size == 1 else None
    node = value.producer()
    if is_standard(node, *_COPIES) and (copied := number(node.inputs[0])) is not None:
        return copied
    if is_standard(node, *_UNARY, *_BINARY):
        return _computed(node.op_type, [number(v) for v in node.inputs])
    known = entries(value) or []
    single = known[0] if len(known) == 1 else None
    return float(single) if isinstance(single, int) else None


def _computed(kind: str, given: Sequence[float | None]) -> float | None:
    known = [n for n in given if n is not None]
    if len(known) < len(given):
        return None
    try:
        found = _UNARY[kind](*known) if kind in _UNARY else _BINARY[kind](*known)
        return float(found)
    except (ArithmeticError, ValueError, TypeError):
        return None


def uniform(value: Any, left: int = 12) -> float | None:
    """The number that all elements of a value are, whatever its shape; None where that is open.

    Truth values are 0 and 1.
    """
    found = constant(value, _MASKS)
    if found is not None:
        same = found.size > 0 and found.dtype.kind in "biuf" and (found == found.flat[0]).all()
        return float(found.flat[0]) if same else None
    node = value.producer()
    if left == 0 or node is None:
        return None
    if is_standard(node, "ConstantOfShape"):
        given = node.attributes.get("value")
        return 0.0 if given is None else float(given.as_tensor().numpy().flat[0])
    if is_standard(node, "Where"):
        chosen = uniform(node.inputs[0], left - 1)
        return None if chosen is None else uniform(node.inputs[1 if chosen else 2], left - 1)
    if is_standard(node, "And"):
        given = [uniform(v, left - 1) for v in node.inputs]
        return None if None in given else float(all(given))
    if is_standard(node, *_COPIES, "Expand", "Reshape", "Transpose", "Slice"):
        return uniform(node.inputs[0], left - 1)
    return None
