"""The one value that every entry on the diagonal of a mask has, where that can be proved."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.passes.composites.expressions import number
from graphopt.passes.composites.places import (
    CHOICES,
    COMPARISONS,
    FILLED,
    FILLS,
    FULL,
    NOT,
    TRIANGLES,
    is_index,
    keeps_place,
)
from graphopt.program import Program, val
from graphopt.rewrite import arguments

aten = torch.ops.aten

INDEX = "index"
"""The value of an entry on the diagonal that equals its row and its column."""

_ARITHMETIC = {
    aten.add.Tensor: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.mul.Tensor: operator.mul,
    aten.logical_and.default: lambda a, b: bool(a) and bool(b),
    aten.bitwise_and.Tensor: lambda a, b: bool(a) and bool(b),
    aten.logical_or.default: lambda a, b: bool(a) or bool(b),
    aten.bitwise_or.Tensor: lambda a, b: bool(a) or bool(b),
}


def diagonal(program: Program, value: Any) -> Any:
    """The one value of all entries ``[..., i, i]``: a number, `INDEX`, or ``None`` if unknown."""
    if (known := number(program, value)) is not None or isinstance(value, bool):
        return value if isinstance(value, bool) else known
    if not isinstance(value, fx.Node):
        return None
    if program.is_constant(value):
        return _diagonal_of(program.tensor(value))
    if value.op != "call_function":
        return None
    return _diagonal_of_call(program, value)


def _diagonal_of(tensor: Tensor) -> Any:
    """The diagonal's one value; where rows or columns broadcast, every entry lies on it."""
    spread = tensor.dim() < 2 or 1 in tensor.shape[-2:]
    values = (tensor if spread else tensor.diagonal(dim1=-2, dim2=-1)).flatten()
    if values.numel() == 0 or values.is_complex() or not bool((values == values[0]).all()):
        return None
    return values[0].item()


def _diagonal_of_call(program: Program, node: fx.Node) -> Any:
    target, given = node.target, arguments(node)
    if target in FULL:
        return FULL[target]
    if target in FILLED:
        return number(program, given["fill_value"])
    if is_index(node):
        return INDEX
    if keeps_place(node):
        return diagonal(program, node.args[0])
    if target in TRIANGLES:
        if not statically_known_true(val(node).shape[-1] == val(node).shape[-2]):
            return None
        upper = -1 if target is aten.tril.default else 1
        inside = given["diagonal"] * upper <= 0
        return diagonal(program, node.args[0]) if inside else 0.0
    if target in CHOICES:
        return _chosen(program, *node.args)
    if target in FILLS:
        inner, condition, fill = node.args
        return _chosen(program, condition, fill, inner)
    return _diagonal_of_arithmetic(program, node)


def _chosen(program: Program, condition: Any, yes: Any, no: Any) -> Any:
    decided = diagonal(program, condition)
    return None if decided in (None, INDEX) else diagonal(program, yes if decided else no)


def _diagonal_of_arithmetic(program: Program, node: fx.Node) -> Any:
    if node.target in NOT and val(node).dtype is torch.bool:
        inner = diagonal(program, node.args[0])
        return None if inner in (None, INDEX) else not inner
    if node.target not in COMPARISONS and node.target not in _ARITHMETIC:
        return None
    if arguments(node).get("alpha", 1) != 1 or not _is_logical(node):
        return None
    a, b = (diagonal(program, v) for v in node.args[:2])
    if a is None or b is None:
        return _absorbed(node, a, b)
    if INDEX in (a, b):
        equal = a == b and (node.target in COMPARISONS or node.target is aten.sub.Tensor)
        a, b = (0, 0) if equal else (None, None)
    function = COMPARISONS.get(node.target) or _ARITHMETIC[node.target]
    return None if a is None else function(a, b)


def _absorbed(node: fx.Node, a: Any, b: Any) -> Any:
    """``false and x`` and ``true or x`` are known without ``x``."""
    known = b if a is None else a
    if known in (None, INDEX):
        return None
    if node.target in (aten.logical_or.default, aten.bitwise_or.Tensor) and known:
        return True
    if node.target in (aten.logical_and.default, aten.bitwise_and.Tensor) and not known:
        return False
    return None


def _is_logical(node: fx.Node) -> bool:
    """Bitwise operators count only where their operands are booleans."""
    bitwise = node.target in (aten.bitwise_and.Tensor, aten.bitwise_or.Tensor)
    return not bitwise or val(node).dtype is torch.bool
