"""Operators that make masks, and where their entries lie in a matrix of rows and columns."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.passes.canonicalize.identity import same_sizes
from graphopt.passes.composites.expressions import CASTS, COPIES, VIEWS, is_call
from graphopt.program import val
from graphopt.rewrite import arguments

aten = torch.ops.aten

FULL = {aten.ones.default: 1.0, aten.ones_like.default: 1.0, aten.new_ones.default: 1.0}
FULL |= {aten.zeros.default: 0.0, aten.zeros_like.default: 0.0, aten.new_zeros.default: 0.0}
FILLED = (aten.full.default, aten.full_like.default, aten.new_full.default)
ARANGE = (aten.arange.default, aten.arange.start, aten.arange.start_step)
SPREAD = (aten.unsqueeze.default, aten.expand.default)
NOT = (aten.logical_not.default, aten.bitwise_not.default)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
CHOICES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
TRIANGLES = (aten.tril.default, aten.triu.default)

_NAMES = ("eq", "ne", "lt", "le", "gt", "ge")
COMPARISONS = {
    getattr(getattr(aten, name), overload): getattr(operator, name)
    for name in _NAMES
    for overload in ("Tensor", "Scalar")
}


def is_index(node: fx.Node) -> bool:
    """``arange`` from zero, laid along the rows or the columns."""
    base = node
    while is_call(base, *SPREAD, *CASTS, *COPIES):
        base = base.args[0]
    if not is_call(base, *ARANGE):
        return False
    given = arguments(base)
    return given.get("start", 0) == 0 and given.get("step", 1) == 1 and axis_of(node) is not None


def axis_of(node: fx.Node) -> int | None:
    """-1 or -2: the axis that holds the entries of an index; others have one entry."""
    shape = val(node).shape
    long = [d - len(shape) for d, n in enumerate(shape) if not statically_known_true(n == 1)]
    return long[0] if len(long) == 1 and long[0] in (-1, -2) else None


def keeps_place(node: fx.Node) -> bool:
    """Whether entry ``[..., i, i]`` is one of the entries ``[..., i, i]`` of the first argument."""
    if is_call(node, *CASTS, *COPIES):
        return True
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(val(source), Tensor):
        return False
    if is_call(node, *VIEWS, *SPREAD):
        return val(source).dim() >= 2 and same_sizes(val(source).shape[-2:], val(node).shape[-2:])
    if node.target is aten.slice.Tensor:
        given = arguments(node)
        inner = given["dim"] % val(node).dim() >= val(node).dim() - 2
        return not inner or (given["start"] in (None, 0) and given["step"] == 1)
    return False
