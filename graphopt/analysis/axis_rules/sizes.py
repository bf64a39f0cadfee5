"""Sizes of tensors as plain integers or sympy expressions: exact, hashable, never a new guard."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
from torch import SymInt

Size: TypeAlias = int | sympy.Expr
Shape: TypeAlias = tuple[Size, ...]


class Untrackable(Exception):  # noqa: N818 - a verdict on one operation, not an error of the user
    """A rule knows its operation but cannot express where the axis goes; the message says why."""


def size_of(value: Any) -> Size:
    """An ``int``, ``SymInt`` or sympy number as a canonical size, without guarding on it."""
    if isinstance(value, SymInt):
        return tidy(value.node.expr)
    return tidy(value)


def tidy(value: Size) -> Size:
    """One spelling per value: integers as ``int``, expressions expanded."""
    if isinstance(value, int):
        return int(value)
    return _tidy_expr(value)


@lru_cache(maxsize=4096)
def _tidy_expr(value: sympy.Expr) -> Size:
    expanded = sympy.expand(value)
    return int(expanded) if expanded.is_Integer else expanded


def product(sizes: Iterable[Size]) -> Size:
    total: Size = 1
    for size in sizes:
        total = tidy(total * size)
    return total


@lru_cache(maxsize=16384)
def quotient(numerator: Size, denominator: Size) -> Size | None:
    """``numerator / denominator`` where that is provably a whole number, else ``None``."""
    if isinstance(numerator, int) and isinstance(denominator, int):
        return numerator // denominator if denominator and numerator % denominator == 0 else None
    ratio = sympy.cancel(sympy.sympify(numerator) / sympy.sympify(denominator))
    return tidy(ratio) if sympy.denom(ratio) == 1 else None


def at_least(value: Size, bound: int) -> bool:
    """Whether ``value >= bound`` is certain; a symbolic size counts as 0 or more."""
    if isinstance(value, int):
        return value >= bound
    return bound <= 0 and bool(value.is_nonnegative)
