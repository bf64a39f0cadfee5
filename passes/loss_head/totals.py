"""Sums over all rows, and what is linear in them: a loss as the body can compute it whole.

``0.5 * cross_entropy(...) + 1e-4 * z.mean()`` is one sum over rows of weighted columns. As such its
gradients for a cotangent of one are those of the loss itself, and can be taken in the forward pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import fx

from graphopt.analysis.axis_rules.sizes import size_of
from graphopt.passes.loss_head.rows import RowSet
from graphopt.program import val
from graphopt.rewrite import Builder, arguments

aten = torch.ops.aten

Number: TypeAlias = fx.Node | float
Build = Callable[[Builder], Number]


@dataclass(frozen=True)
class Term:
    """``factor * sum of column`` over some rows; factors are built behind what they need."""

    column: fx.Node
    rows: RowSet
    factors: tuple[Build, ...] = ()


@dataclass(frozen=True)
class Total:
    """A sum of terms; NaN, without gradient, where one of ``valid`` is false."""

    terms: tuple[Term, ...]
    valid: tuple[Build, ...] = ()

    def times(self, factor: Build) -> Total:
        terms = tuple(replace(t, factors=(*t.factors, factor)) for t in self.terms)
        return replace(self, terms=terms)

    def plus(self, other: Total) -> Total:
        return Total(self.terms + other.terms, self.valid + other.valid)


def combined(node: fx.Node, totals: dict[fx.Node, Total], late: Callable[[fx.Node], bool]) -> Any:
    """A node that is linear in totals as a `Total`, else ``None``.

    Args:
        late: whether a node depends on the product, so that no factor can be made of it.
    """
    given = list(arguments(node).values())
    if any(isinstance(v, fx.Node) and v not in totals and late(v) for v in given):
        return None
    known = [totals.get(v) if isinstance(v, fx.Node) else None for v in given[:2]]
    first, second = (*known, None)[:2]
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
    if name in ("aten::view", "aten::reshape", "aten::squeeze", "aten::unsqueeze", "aten::clone"):
        return first
    if name == "aten::neg" and first:
        return first.times(lambda _: -1.0)
    if name in ("aten::_to_copy", "aten::to") and first and val(node).is_floating_point():
        return first
    if name in ("aten::add", "aten::sub") and first and second:
        sign = -1.0 if name == "aten::sub" else 1.0
        alpha = arguments(node)["alpha"]
        return first.plus(second.times(lambda _: sign * alpha))
    total, factor = (second, given[0]) if second else (first, given[1] if given[1:] else None)
    if name == "aten::mul" and total and not (first and second) and _is_scalar(factor):
        return total.times(lambda _: factor)
    if name == "aten::div" and first and not second and _is_scalar(given[1]):
        divisor = given[1]
        return first.times(lambda build: reciprocal(build, divisor))
    return None


def _is_scalar(value: Any) -> bool:
    if isinstance(value, fx.Node):
        fake = val(value)
        return isinstance(fake, torch.Tensor) and all(n == 1 for n in map(size_of, fake.shape))
    return isinstance(value, int | float)


def reciprocal(build: Builder, value: Number) -> Number:
    if not isinstance(value, fx.Node):
        return 1.0 / value if value else float("inf")
    if isinstance(fake := val(value), torch.Tensor):
        if not fake.is_floating_point():
            value = build(aten._to_copy.default, value, dtype=torch.float64)
        return build(aten.reciprocal.default, value)
    return build(operator.truediv, 1.0, value)
