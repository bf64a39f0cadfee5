"""Masks that are provably a triangle, for every size."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.passes.composites.expressions import number
from graphopt.passes.composites.places import (
    CHOICES,
    COMPARISONS,
    FILLED,
    FILLS,
    FULL,
    NOT,
    TRIANGLES,
    axis_of,
    is_index,
    keeps_place,
)
from graphopt.program import Program, val
from graphopt.rewrite import arguments

aten = torch.ops.aten


class Triangle(Enum):
    """Where a matrix is not zero: at and below the diagonal, above it, everywhere, nowhere."""

    LOWER = "lower"
    UPPER = "upper"
    ALL = "all"
    NONE = "none"


_OPPOSITE = {
    Triangle.LOWER: Triangle.UPPER,
    Triangle.UPPER: Triangle.LOWER,
    Triangle.ALL: Triangle.NONE,
    Triangle.NONE: Triangle.ALL,
}


def triangle(program: Program, value: Any) -> Triangle | None:
    """Where a matrix is not zero, if that is a triangle for every size, else ``None``."""
    if (known := number(program, value)) is not None:
        return Triangle.ALL if known else Triangle.NONE
    if not isinstance(value, fx.Node):
        return None
    if program.is_constant(value):
        return _triangle_of(program.tensor(value))
    return _triangle_of_call(program, value) if value.op == "call_function" else None


def _triangle_of(tensor: Tensor) -> Triangle | None:
    if tensor.dim() < 2 or tensor.numel() != tensor.shape[-1] * tensor.shape[-2]:
        return None
    matrix = tensor.reshape(tensor.shape[-2:]) != 0
    if bool(matrix.all()):
        return Triangle.ALL
    lower = torch.ones_like(matrix).tril()
    if torch.equal(matrix, lower):
        return Triangle.LOWER
    return Triangle.UPPER if torch.equal(matrix, ~lower) else None


def _triangle_of_call(program: Program, node: fx.Node) -> Triangle | None:
    target, given = node.target, arguments(node)
    if target in FULL or target in FILLED:
        filled = FULL.get(target, number(program, given.get("fill_value")))
        return None if filled is None else Triangle.ALL if filled else Triangle.NONE
    if keeps_place(node):
        return triangle(program, node.args[0])
    if target in TRIANGLES:
        wanted = {aten.tril.default: (0, Triangle.LOWER), aten.triu.default: (1, Triangle.UPPER)}
        k, result = wanted[target]
        whole = triangle(program, node.args[0]) is Triangle.ALL
        return result if whole and given["diagonal"] == k else None
    if target in NOT and val(node).dtype is torch.bool:
        return _opposite(triangle(program, node.args[0]))
    if target in (aten.eq.Scalar, aten.ne.Scalar) and node.args[1] == 0:
        inner = triangle(program, node.args[0])
        return _opposite(inner) if target is aten.eq.Scalar else inner
    return _chosen_triangle(program, node) or _ordered(node)


def _opposite(found: Triangle | None) -> Triangle | None:
    return None if found is None else _OPPOSITE[found]


def _chosen_triangle(program: Program, node: fx.Node) -> Triangle | None:
    """``where(c, a, b)`` and ``masked_fill`` where one choice is zero and the other is not."""
    if node.target in FILLS:
        no, condition, yes = node.args
    elif node.target in CHOICES:
        condition, yes, no = node.args
    else:
        return None
    kinds = triangle(program, yes), triangle(program, no)
    where = triangle(program, condition)
    if kinds == (Triangle.ALL, Triangle.NONE):
        return where
    return _opposite(where) if kinds == (Triangle.NONE, Triangle.ALL) else None


def _ordered(node: fx.Node) -> Triangle | None:
    """``row >= column`` and its like, of two ranges from zero."""
    if node.target not in COMPARISONS or not all(isinstance(a, fx.Node) for a in node.args[:2]):
        return None
    a, b = node.args[:2]
    if not (is_index(a) and is_index(b)) or {axis_of(a), axis_of(b)} != {-1, -2}:
        return None
    name = node.target._schema.name.split("::")[1]
    row_first = axis_of(a) == -2
    lower = {"ge": row_first, "le": not row_first}
    upper = {"lt": row_first, "gt": not row_first}
    if lower.get(name):
        return Triangle.LOWER
    return Triangle.UPPER if upper.get(name) else None


def fill_of(program: Program, value: Any) -> float | None:
    """The highest of the entries that are not zero, for masks that one number fills."""
    if (known := number(program, value)) is not None:
        return known
    if not isinstance(value, fx.Node):
        return None
    if value.op == "placeholder" and not program.is_constant(value):
        return None
    if program.is_constant(value):
        filled = program.tensor(value)[program.tensor(value) != 0]
        return filled.max().item() if filled.numel() else None
    if value.target in FILLED:
        return number(program, arguments(value)["fill_value"])
    if value.target in TRIANGLES or keeps_place(value):
        return fill_of(program, value.args[0])
    if value.target in FILLS:
        return number(program, value.args[2])
    if value.target in CHOICES:
        fills = [f for f in (number(program, v) for v in value.args[1:]) if f]
        return fills[0] if len(fills) == 1 else None
    return None
