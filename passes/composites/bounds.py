"""How low the entries of an additive mask can be, as far as its graph tells."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.passes.canonicalize.views import PERMUTES
from graphopt.passes.composites.expressions import CASTS, COPIES, VIEWS, number
from graphopt.program import Program, val
from graphopt.rewrite import arguments

aten = torch.ops.aten

MODERATE = 1e4
"""Activations and parameters are taken to be smaller than this; hidden scores are not."""

UNKNOWN = (-math.inf, math.inf)
_ORDINARY = (-MODERATE, MODERATE)

_PASSING = frozenset(
    {
        aten.slice.Tensor,
        aten.select.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.repeat.default,
        aten.index.Tensor,
        *COPIES,
        *VIEWS,
        *PERMUTES,
    }
)
_LAYERS = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.bmm.default,
        aten.einsum.default,
        aten.convolution.default,
        aten.layer_norm.default,
        aten.embedding.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.softmax.int,
    }
)
_FULL = {aten.ones.default: 1.0, aten.zeros.default: 0.0, aten.ones_like.default: 1.0}
_FULL |= {aten.zeros_like.default: 0.0, aten.new_ones.default: 1.0, aten.new_zeros.default: 0.0}

Bounds = tuple[float, float]


def bounds(program: Program, value: Any) -> Bounds:
    """Lowest and highest entry; infinite where nothing is known."""
    if (known := number(program, value)) is not None:
        return known, known
    if not isinstance(value, fx.Node) or not isinstance(val(value), Tensor):
        return UNKNOWN
    if val(value).dtype is torch.bool:
        return 0.0, 1.0
    if program.is_constant(value):
        tensor = program.tensor(value)
        return (tensor.min().item(), tensor.max().item()) if tensor.numel() else (0.0, 0.0)
    if program.target_of(value) in program.state:
        return _ORDINARY
    return _of_call(program, value) if value.op == "call_function" else UNKNOWN


def _of_call(program: Program, node: fx.Node) -> Bounds:
    target, given = node.target, arguments(node)
    if target in _FULL:
        return _FULL[target], _FULL[target]
    if target in (aten.full.default, aten.full_like.default, aten.new_full.default):
        return bounds(program, given["fill_value"])
    if target in _LAYERS:
        return _ORDINARY
    if target in CASTS:
        return _cast(bounds(program, node.args[0]), val(node).dtype)
    if target in _PASSING:
        return bounds(program, node.args[0])
    if target in (aten.tril.default, aten.triu.default):
        return _union(bounds(program, node.args[0]), (0.0, 0.0))
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        return _union(bounds(program, node.args[1]), bounds(program, node.args[2]))
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _union(bounds(program, node.args[0]), bounds(program, node.args[2]))
    return _of_arithmetic(program, node, given)


def _of_arithmetic(program: Program, node: fx.Node, given: dict[str, Any]) -> Bounds:
    if given.get("alpha", 1) != 1 or len(node.args) < 1:
        return UNKNOWN
    pairs = [bounds(program, v) for v in node.args[:2]]
    if node.target is aten.neg.default:
        return -pairs[0][1], -pairs[0][0]
    if len(pairs) < 2:
        return UNKNOWN
    a, b = pairs
    if node.target is aten.add.Tensor:
        return _sum(a, b, val(node).dtype)
    if node.target is aten.sub.Tensor:
        return _sum(a, (-b[1], -b[0]), val(node).dtype)
    if node.target is aten.rsub.Scalar:
        return _sum(b, (-a[1], -a[0]), val(node).dtype)
    if node.target is aten.mul.Tensor:
        products = [x * y for x in a for y in b]
        return UNKNOWN if any(map(math.isnan, products)) else (min(products), max(products))
    if node.target in (aten.maximum.default, aten.max.other):
        return max(a[0], b[0]), max(a[1], b[1])
    return UNKNOWN


def _union(a: Bounds, b: Bounds) -> Bounds:
    return min(a[0], b[0]), max(a[1], b[1])


def _sum(a: Bounds, b: Bounds, dtype: torch.dtype) -> Bounds:
    """Of two values of which one is huge the smaller is absorbed; two huge ones overflow."""
    low, high = a[0] + b[0], a[1] + b[1]
    if min(abs(a[0]), abs(b[0])) <= MODERATE and dtype.is_floating_point:
        low = max(low, torch.finfo(dtype).min) if math.isfinite(low) else low
    return _cast((low, high), dtype)


def _cast(found: Bounds, dtype: torch.dtype) -> Bounds:
    if not dtype.is_floating_point:
        return found
    limit = torch.finfo(dtype)
    low = -math.inf if found[0] < limit.min else found[0]
    return low, math.inf if found[1] > limit.max else found[1]
