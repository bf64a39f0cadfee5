"""Limits that torch does not trace: a table looked up at ``arange(n)`` allows no larger ``n``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.program import Program, val

aten = torch.ops.aten

_ARANGES = {aten.arange.default: 0, aten.arange.start: 1, aten.arange.start_step: 1}
"""Position of the end among the arguments."""

_SAME_VALUES = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.expand.default,
        aten.permute.default,
        aten.repeat.default,
        aten.reshape.default,
        aten.squeeze.dim,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten._unsafe_view.default,
    }
)
_SIGNS = {
    aten.add.Tensor: 1,
    aten.add.Scalar: 1,
    aten.sub.Tensor: -1,
    aten.sub.Scalar: -1,
}
_CASTS = frozenset({aten._to_copy.default, aten.to.dtype, aten.to.device})
_EVERYTHING = 2**62


def table_limits(program: Program) -> dict[sympy.Symbol, int]:
    """The largest size of every symbol for which positions stay inside the tables they select from.

    Found for embeddings and other selections by ``arange(n)`` plus a constant, where ``n`` is one
    dynamic size, or a multiple of it plus a constant.
    """
    limits: dict[sympy.Symbol, int] = {}
    for rows, index in _lookups(program):
        largest = _largest(index)
        found = None if largest is None else _limit(largest, rows)
        if found is not None:
            symbol, limit = found
            limits[symbol] = min(limit, limits.get(symbol, limit))
    return limits


def _lookups(program: Program) -> Iterator[tuple[int, fx.Node]]:
    """Rows of a table and the positions that are looked up in it."""
    for node in program.graph.find_nodes(op="call_function", target=aten.embedding.default):
        yield from _lookup(node.args[0], 0, node.args[1])
    for node in program.graph.find_nodes(op="call_function", target=aten.index_select.default):
        yield from _lookup(*node.args)
    for node in program.graph.find_nodes(op="call_function", target=aten.index.Tensor):
        for axis, index in enumerate(node.args[1]):
            yield from _lookup(node.args[0], axis, index)


def _lookup(table: Any, axis: Any, index: Any) -> Iterator[tuple[int, fx.Node]]:
    rows = val(table).shape[axis]
    if isinstance(rows, int) and isinstance(index, fx.Node):
        yield rows, index


def _largest(node: Any) -> sympy.Expr | None:
    """The largest value in a tensor, where it is known to be ``arange`` shifted by a constant."""
    if not isinstance(node, fx.Node):
        return None
    target: Any = node.target
    if target in _ARANGES:
        return _end(node)
    if target in _SAME_VALUES or _is_integer_cast(node) or _is_whole_slice(node):
        return _largest(node.args[0])
    if target in _SIGNS and set(node.kwargs) <= {"alpha"} and node.kwargs.get("alpha", 1) == 1:
        start, shift = _largest(node.args[0]), _number(node.args[1])
        return None if start is None or shift is None else start + _SIGNS[target] * shift
    return None


def _end(node: fx.Node) -> sympy.Expr | None:
    target: Any = node.target
    step = node.args[2] if target is aten.arange.start_step and len(node.args) > 2 else 1
    end = _number(node.args[_ARANGES[target]])
    return end - 1 if end is not None and step == 1 and _is_integer(node) else None


def _is_integer(node: fx.Node) -> bool:
    dtype = val(node).dtype
    return not dtype.is_floating_point and dtype.itemsize >= 4


def _is_integer_cast(node: fx.Node) -> bool:
    return node.target in _CASTS and _is_integer(node)


def _is_whole_slice(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    given: list[Any] = list(node.args[2:])
    start, end, step = given + [0, _EVERYTHING, 1][len(given) :]
    return start in (0, None) and step == 1 and isinstance(end, int) and end >= _EVERYTHING


def _number(value: Any) -> sympy.Expr | None:
    """A constant integer or a size, as an expression."""
    known = val(value) if isinstance(value, fx.Node) else value
    if isinstance(known, torch.SymInt):
        return known.node.expr
    return sympy.Integer(known) if isinstance(known, int) else None


def _limit(largest: sympy.Expr, rows: int) -> tuple[sympy.Symbol, int] | None:
    """The largest symbol for which ``largest < rows``, if it is a line in one symbol."""
    if len(largest.free_symbols) != 1:
        return None
    (symbol,) = largest.free_symbols
    slope = largest.coeff(symbol, 1)
    rest = sympy.expand(largest - slope * symbol)
    if not (slope.is_Integer and rest.is_Integer and slope > 0):
        return None
    return symbol, int((rows - 1 - rest) // slope)
