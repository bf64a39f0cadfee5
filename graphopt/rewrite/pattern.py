"""Patterns: small declarative trees over ATen operators.

``op(aten.mul.Tensor, "x", num("c"))`` matches a product with a number, however it was spelled. A
string is a variable; the same name twice must bind the same node. Literals are significant, and so
are arguments that the pattern leaves out: they must have the operator's default, unless the pattern
ends in ``...``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_float
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch

aten = torch.ops.aten

COMMUTATIVE = frozenset(
    {aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default}
)


@dataclass(frozen=True)
class Var:
    """Binds any node or literal; ``where`` may narrow it by a predicate on the value."""

    name: str
    where: Callable[[Any], bool] | None = None


@dataclass(frozen=True)
class Num:
    """Binds a number: a Python scalar or a constant tensor without axes.

    ``value`` demands that number: exactly where float32 holds it, such as 1 or 0.5, else with a
    relative tolerance of 1e-6, so that float32 constants match.
    """

    name: str | None = None
    value: float | None = None

    def accepts(self, number: float) -> bool:
        if self.value is None or number == self.value:
            return True
        if _in_float32(self.value):
            return False
        return math.isclose(number, self.value, rel_tol=1e-6, abs_tol=1e-12)


@dataclass(frozen=True)
class Op:
    """One operator node.

    Attributes:
        targets: operators that satisfy this pattern.
        args: patterns for the leading schema arguments.
        kwargs: patterns for further schema arguments, by name.
        name: binds the node itself.
        rest: arguments not mentioned may have any value.
        escapes: the node may have users outside the match (it then stays in the graph).
    """

    targets: tuple[Callable[..., Any], ...]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    rest: bool = False
    escapes: bool = False

    def size(self) -> int:
        """Number of operator nodes in the pattern (the smallest alternative counts)."""
        return 1 + sum(pattern_size(p) for p in (*self.args, *self.kwargs.values()))

    def depth(self) -> int:
        """Longest chain of operators in the pattern."""
        children = (*self.args, *self.kwargs.values())
        return 1 + max((pattern_depth(p) for p in children), default=0)


@dataclass(frozen=True)
class Either:
    """Any of several patterns, tried in order."""

    options: tuple[Any, ...]


Pattern = Var | Num | Op | Either


def op(
    target: Callable[..., Any] | tuple[Callable[..., Any], ...],
    *args: Any,
    name: str | None = None,
    escapes: bool = False,
    **kwargs: Any,
) -> Op:
    """An operator pattern; strings become variables and a trailing ``...`` opens the rest."""
    rest = bool(args) and isinstance(args[-1], EllipsisType)
    targets = target if isinstance(target, tuple) else (target,)
    leading = tuple(_lift(a) for a in (args[:-1] if rest else args))
    named = {key: _lift(value) for key, value in kwargs.items()}
    return Op(targets, leading, named, name, rest, escapes)


def var(name: str, where: Callable[[Any], bool] | None = None) -> Var:
    """A variable with an optional predicate on the bound value."""
    return Var(name, where)


def num(value: str | float) -> Num:
    """``num("c")`` binds any number as ``c``; ``num(0.5)`` demands that value."""
    return Num(name=value) if isinstance(value, str) else Num(value=float(value))


def either(*options: Any) -> Either:
    """Any of several spellings."""
    return Either(tuple(_lift(o) for o in options))


def _in_float32(value: float) -> bool:
    return c_float(value).value == value


def _lift(value: Any) -> Any:
    if isinstance(value, str):
        return Var(value)
    if isinstance(value, list | tuple):
        return type(value)(_lift(v) for v in value)
    return value


def pattern_size(pattern: Any) -> int:
    if isinstance(pattern, Op):
        return pattern.size()
    if isinstance(pattern, Either):
        return min(pattern_size(p) for p in pattern.options)
    if isinstance(pattern, list | tuple):
        return sum(pattern_size(p) for p in pattern)
    return 0


def pattern_depth(pattern: Any) -> int:
    if isinstance(pattern, Op):
        return pattern.depth()
    if isinstance(pattern, Either):
        return max(pattern_depth(p) for p in pattern.options)
    if isinstance(pattern, list | tuple):
        return max((pattern_depth(p) for p in pattern), default=0)
    return 0


def anchors(pattern: Any) -> frozenset[Callable[..., Any]]:
    """Operators a match of this pattern can be rooted at."""
    if isinstance(pattern, Op):
        return frozenset(pattern.targets)
    if isinstance(pattern, Either):
        return frozenset().union(*(anchors(p) for p in pattern.options))
    return frozenset()
