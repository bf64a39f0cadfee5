"""Rows of a product as one flat axis: which rows a tensor holds, and the tensor laid out so.

A product ``(B, S, V)`` has ``B * S`` rows. What follows may hold them folded into one dim, in two,
transposed, or only some of them (``logits[:, :-1]``); a `RowSet` says which, whatever the layout.
Inside a fused region every tensor is a matrix ``(n, width)`` or a column ``(n, 1)``.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from graphopt.analysis.axes import Leg, Placement
from graphopt.analysis.axis_rules.fold import Factor, merge
from graphopt.analysis.axis_rules.sizes import Shape, Size, product, quotient, size_of, tidy
from graphopt.errors import IllegalRewriteError
from graphopt.program import val
from graphopt.rewrite import Builder
from graphopt.rewrite.views import is_packed

aten = torch.ops.aten


_ARITHMETIC = {sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv}

Digit = tuple[Size, Size]
"""Size and step."""


@dataclass(frozen=True)
class RowSet:
    """Row indices ``start + sum of step * digit``; digits are ``(size, step)``, slowest first."""

    digits: tuple[Digit, ...]
    start: Size = 0


@dataclass(frozen=True)
class Rows:
    """The row dims of a product: sizes, and what one step along each adds to the row index."""

    sizes: Shape

    @property
    def steps(self) -> Shape:
        return tuple(product(self.sizes[k + 1 :]) for k in range(len(self.sizes)))

    @property
    def every(self) -> RowSet:
        return self._set(tuple(zip(self.sizes, self.steps, strict=True)), 0)

    def held(self, place: Placement) -> RowSet | None:
        """The rows in a tensor; ``None`` where their digits are not those of the product."""
        legs = self.ordered(place)
        return (
            None if legs is None else self._set([(leg.size, leg.step) for leg in legs], place.start)
        )

    def ordered(self, place: Placement) -> list[Leg] | None:
        """The legs from the slowest digit to the fastest."""
        steps = self.steps
        if any(leg.step not in steps for leg in place.legs):
            return None
        return sorted(place.legs, key=lambda leg: steps.index(leg.step))

    @staticmethod
    def _set(digits: Sequence[tuple[Size, Size]], start: Size) -> RowSet:
        joined = merge(Factor(*digit) for digit in digits)
        return RowSet(tuple((f.size, f.step or 0) for f in joined), start)

    def spans(self, rows: RowSet) -> list[tuple[Size, Size]] | None:
        """Start and size along each dim of the rows in a set; ``None`` where it is no box."""
        if rows == self.every:
            return [(0, size) for size in self.sizes]
        digits, rest = list(rows.digits), rows.start
        found: list[tuple[Size, Size]] = []
        for step in self.steps:
            first, rest = _divided(rest, step)
            count, digits = _leading(digits, step)
            found.append((first, count))
        return found if rest == 0 and not digits else None


def _leading(digits: list[Digit], step: Size) -> tuple[Size, list[Digit]]:
    """How many steps of one size digits take, and the digits that are left of them.

    A digit may stand for several dims, joined: ``(6, 1)`` are two steps of 3, and ``(3, 1)``.
    """
    if not digits:
        return 1, digits
    (count, own), *others = digits
    if own == step:
        return count, others
    inner = quotient(step, own)
    outer = None if inner is None else quotient(count, inner)
    if inner is None or outer is None:
        return 1, digits
    return outer, [(inner, own), *others]


def _divided(value: Size, step: Size) -> tuple[Size, Size]:
    """Quotient and rest of an offset; a rest is a plain number below any symbolic step, or one
    that is missing from it."""
    if isinstance(value, int) and isinstance(step, int):
        return divmod(value, step)
    if isinstance(value, int) or step == 1:
        return (0, value) if step != 1 else (value, 0)
    constant, multiple = value.as_coeff_Add()
    whole = quotient(tidy(multiple), step)
    if whole is None:
        return 0, value
    if constant < 0:
        return tidy(whole - 1), tidy(step + constant)
    return whole, tidy(constant)


@dataclass(frozen=True)
class RowInput:
    """A tensor of the program that a body takes row by row.

    Attributes:
        node: ``None`` for the index of the row.
        place: where the rows live in it, or in ``like`` where it broadcasts over some of them.
    """

    node: fx.Node | None
    place: Placement
    like: fx.Node | None = None


def shape_of(node: fx.Node) -> Shape:
    return tuple(map(size_of, val(node).shape))


class Flat:
    """Lays tensors out as ``(N, width)``, and columns ``(N, k)`` back as they were."""

    def __init__(self, rows: Rows, chosen: RowSet, build: Builder) -> None:
        self.rows, self.chosen, self.build = rows, chosen, build
        self.sources: list[fx.Node] = []

    def hidden(self, node: fx.Node) -> fx.Node:
        """The left factor ``(*rows, D)`` as ``(N, D)``, of the chosen rows alone."""
        spans = self._spans(self.chosen)[: val(node).dim() - 1]  # no group
        for dim, (first, size) in enumerate(spans):
            if size != self.rows.sizes[dim]:
                bounds = self._bounds(first, size, self.rows.sizes[dim])
                node = self.build(aten.slice.Tensor, node, dim, *bounds)
        if spans != [(0, size) for size in self.rows.sizes[: len(spans)]]:
            node = self.build(aten.clone.default, node, memory_format=torch.contiguous_format)
        self.sources.append(node)
        if val(node).dim() == 2:
            return node
        return self._reshaped(node, [-1, val(node).shape[-1]])

    def count(self, rows: RowSet) -> fx.Node | int:
        """The number of rows in a set."""
        sizes = self.rows.sizes if rows == self.rows.every else [s for s, _ in rows.digits]
        total: Any = 1
        for size in sizes:
            total = self.build(operator.mul, total, self._size(size))
        return total

    def mask(self, rows: RowSet) -> fx.Node:
        """Of the chosen rows, ``(N,)``, those that belong to a set."""
        spans = self._spans(rows)
        sizes = [self._size(size) for _, size in spans]
        device = val(self.sources[0]).device
        ones = self.build(aten.ones.default, sizes, dtype=torch.bool, device=device)
        return self._reshaped(self._padded(ones, spans), [-1])

    def _padded(self, node: fx.Node, spans: Sequence[tuple[Size, Size]]) -> fx.Node:
        """A box of rows, one dim each in front, with all other rows around it."""
        pads: list[Any] = [0, 0] * (val(node).dim() - len(spans))
        for (first, size), whole in zip(reversed(spans), reversed(self.rows.sizes), strict=True):
            pads += [self._number(first), self._number(tidy(whole - first - size))]
        return self.build(aten.constant_pad_nd.default, node, pads)

    def operand(self, node: fx.Node, place: Placement) -> fx.Node:
        """A tensor that holds rows at ``place`` as ``(N, *rest)``, zero in rows it does not hold.

        Dims of one position that are no rows are dropped.
        """
        held = self.rows.held(place)
        if held == self.chosen:
            return self._flattened(node, place)
        assert held is not None
        spans = self._spans(held)
        flat = self._flattened(node, place)
        rest = list(shape_of(flat)[1:])
        box = self._reshaped(flat, self._sizes([s for _, s in spans] + rest))
        padded = self._padded(box, spans)
        return self._reshaped(padded, [-1, *self._sizes(rest)])

    def _flattened(self, node: fx.Node, place: Placement) -> fx.Node:
        legs = self.rows.ordered(place) or []
        shape = shape_of(node)
        rest = [d for d in range(len(shape)) if d not in place.dims and shape[d] != 1]
        order = [leg.dim for leg in legs]
        split = len(set(order)) < len(order)
        if split and order == sorted(order) and _is_ordered(legs):
            order = list(dict.fromkeys(order))  # already row-major within each dim
        elif split:
            node, order, rest = self._unfolded(node, place, legs, rest)
            shape = shape_of(node)
        ones = [d for d in range(len(shape)) if d not in (*order, *rest)]
        wanted = [*order, *rest, *ones]
        if wanted != list(range(len(shape))):
            node = self.build(aten.permute.default, node, wanted)
        width = self._sizes([shape[d] for d in rest])
        if len(order) == 1 and not ones:
            return node
        return self._reshaped(node, [-1, *width])

    def expanded(self, node: fx.Node, place: Placement, like: fx.Node) -> fx.Node:
        """A tensor that broadcasts against ``like``, with all of its row dims."""
        shape, wanted = shape_of(node), list(shape_of(like))
        ranks = [1] * (len(wanted) - len(shape)) + list(shape)
        wanted = [size if d in place.dims else ranks[d] for d, size in enumerate(wanted)]
        if len(ranks) > len(shape):
            node = self._reshaped(node, self._sizes(ranks))
        return self.build(aten.expand.default, node, [self._size(s) for s in wanted])

    def _unfolded(
        self, node: fx.Node, place: Placement, legs: list[Leg], rest: list[int]
    ) -> tuple[fx.Node, list[int], list[int]]:
        """Every digit in a dim of its own."""
        sizes: list[Size] = []
        where: dict[Leg, int] = {}
        kept: dict[int, int] = {}
        for dim, size in enumerate(shape_of(node)):
            inner = [leg for leg in place.legs if leg.dim == dim]
            if not inner:
                kept[dim] = len(sizes)
                sizes.append(size)
            for leg in inner:
                where[leg] = len(sizes)
                sizes.append(leg.size)
        node = self._reshaped(node, self._sizes(sizes))
        return node, [where[leg] for leg in legs], [kept[d] for d in rest]

    def restored(self, column: fx.Node, place: Placement, shape: Shape) -> fx.Node:
        """``(N, k)`` as a tensor of ``shape`` that holds rows at ``place``."""
        held = self.rows.held(place)
        if held != self.chosen and held is not None:
            column = self._box(column, held)
        legs = self.rows.ordered(place) or []
        order = [leg.dim for leg in legs]
        if order != sorted(order) or not _is_ordered(legs):
            sizes = self._sizes([leg.size for leg in legs])
            column = self._reshaped(column, [*sizes, -1])
            back = sorted(range(len(legs)), key=lambda k: place.legs.index(legs[k]))
            column = self.build(aten.permute.default, column, [*back, len(legs)])
        if shape_of(column) == shape:
            return column
        return self._reshaped(column, self._sizes(shape))

    def _box(self, column: fx.Node, rows: RowSet) -> fx.Node:
        """Of ``(N, k)`` for all rows, those in a set."""
        spans = self._spans(rows)
        width = list(shape_of(column)[1:])
        column = self._reshaped(column, self._sizes([*self.rows.sizes, *width]))
        for dim, ((first, size), whole) in enumerate(zip(spans, self.rows.sizes, strict=True)):
            if size != whole:
                bounds = self._bounds(first, size, whole)
                column = self.build(aten.slice.Tensor, column, dim, *bounds)
        return self._reshaped(column, [-1, *self._sizes(width)])

    def _sizes(self, shape: Sequence[Size]) -> list[Any]:
        """Sizes as arguments of a view: numbers, at most one ``-1``, or nodes that compute them."""
        symbols = [s for s in shape if not isinstance(s, int)]
        if len(symbols) == 1 and 0 not in shape:
            return [s if isinstance(s, int) else -1 for s in shape]
        return [self._size(s) for s in shape]

    def _spans(self, rows: RowSet) -> list[tuple[Size, Size]]:
        """Start and size of the rows of a set along each dim."""
        spans = self.rows.spans(rows)
        if spans is None:
            raise IllegalRewriteError("the rows that are read are no box of the product's")
        return spans

    def _reshaped(self, node: fx.Node, sizes: Sequence[Any]) -> fx.Node:
        """A copy first, where strides of symbolic sizes do not say whether there are gaps."""
        if not all(isinstance(size, int) for size in shape_of(node)) and not is_packed(val(node)):
            node = self.build(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.build(aten.reshape.default, node, sizes)

    def _bounds(self, first: Size, size: Size, extent: Size) -> tuple[Any, Any]:
        """Start and end of a slice, counted from the back where that makes them plain numbers."""
        end = tidy(first + size)
        start, stop = (n if isinstance(n, int) else tidy(n - extent) for n in (first, end))
        start = start if isinstance(start, int) else self._number(first)
        if end == extent:
            return start, sys.maxsize
        return start, stop if isinstance(stop, int) else self._number(end)

    def _size(self, size: Size) -> fx.Node | int:
        return size if isinstance(size, int) else self._number(size)

    def _number(self, size: Size) -> fx.Node | int:
        """A symbolic size, read off a tensor that has it, or has some positions more or less; or a
        product of such sizes."""
        if isinstance(size, int):
            return size
        for node in self.sources:
            for dim, extent in enumerate(shape_of(node)):
                more = tidy(size - extent)
                if isinstance(more, int):
                    read = self.build.size(node, dim)
                    return self.build(operator.add, read, more) if more else read
        made = next((make for kind, make in _ARITHMETIC.items() if isinstance(size, kind)), None)
        if made is None:
            raise IllegalRewriteError(f"no tensor of the region has the size {size}")
        first, *others = map(self._number, map(tidy, size.args))
        return reduce(lambda a, b: self.build(made, a, b), others, first)


def _is_ordered(legs: Sequence[Leg]) -> bool:
    """Whether digits that share a dim stand in it from the slowest to the fastest."""
    for before, after in pairwise(legs):
        if before.dim == after.dim and quotient(before.inner, after.inner) is None:
            return False
    return True
