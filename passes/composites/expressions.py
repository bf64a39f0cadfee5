"""Small questions about hand-written expressions that every recogniser asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.passes.canonicalize.views import PERMUTES, permutation
from graphopt.program import Program, is_random, val
from graphopt.rewrite import Matcher, arguments

aten = torch.ops.aten

CASTS = frozenset(
    {
        aten._to_copy.default,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.other,
        aten.type_as.default,
    }
)
COPIES = frozenset(
    {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.lift_fresh_copy.default}
)
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
PRODUCTS = frozenset(
    {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
)
DROPOUTS = frozenset({aten.dropout.default, aten.native_dropout.default})


def is_call(value: Any, *targets: Any) -> bool:
    """Whether the value is a node that calls one of ``targets``."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(val(value), Tensor)


def number(program: Program, value: Any) -> float | None:
    """The number a literal or a constant scalar tensor stands for, copies and casts aside."""
    while is_call(value, *CASTS, *COPIES):
        value = value.args[0]
    return Matcher(program).number(value)


def scaled(program: Program, node: fx.Node) -> tuple[fx.Node, float] | None:
    """``x, c`` where the node is ``x * c`` or ``x / c`` with a number ``c``, else ``None``."""
    if not is_call(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return None
    if arguments(node).get("rounding_mode") is not None:
        return None
    a, b = node.args[:2]
    product = node.target in (aten.mul.Tensor, aten.mul.Scalar)
    if product and number(program, a) is not None:
        a, b = b, a
    factor = number(program, b)
    if factor is None or not is_tensor(a) or val(a).dtype != val(node).dtype:
        return None
    if not product and factor == 0.0:
        return None
    return a, factor if product else 1.0 / factor


def reordered(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
    """``x, order`` where the node is ``x.permute(order)`` in any spelling, else ``None``."""
    return (node.args[0], tuple(permutation(node))) if is_call(node, *PERMUTES) else None


def same_value(a: Any, b: Any) -> bool:
    """Whether two values are the same node, or one deterministic operator on the same values."""
    if a is b:
        return True
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and bool(a == b)
    if not is_call(a, b.target) or is_random(a):
        return False
    left, right = arguments(a), arguments(b)
    return left.keys() == right.keys() and all(same_value(left[k], right[k]) for k in left)


def upward(node: fx.Node, depth: int) -> Iterator[fx.Node]:
    """The node and what it is computed from, nearest first, up to ``depth`` operators away."""
    level = {node: None}
    for _ in range(depth + 1):
        yield from level
        level = dict.fromkeys(a for n in level for a in n.all_input_nodes)
