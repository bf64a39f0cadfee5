"""Building the operator's call, and what stands before and behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.analysis.axes import Placement
from graphopt.kernels.chunked_rows import chunked_rows, spell
from graphopt.passes.loss_head.body import SAMPLE
from graphopt.passes.loss_head.rows import Flat, RowInput, shape_of
from graphopt.passes.loss_head.totals import Term, Total
from graphopt.passes.loss_head.translate import Translation
from graphopt.program import val
from graphopt.rewrite import Builder

aten = torch.ops.aten

WHOLE = Placement()
"""Of a tensor that is laid out as the operator takes it."""


class Call:
    """One call of ``chunked_rows`` that gives the values of some nodes of a program.

    Args:
        options: of the operator, besides.
    """

    def __init__(
        self, found: Translation, build: Builder, chunk_bytes: int | None, **options: float
    ) -> None:
        self.found, self.build, self.chunk_bytes = found, build, chunk_bytes
        self.options = options
        self.flat = found.flat = Flat(found.rows, found.chosen, build)

    def emit(self, roots: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
        """The new value of each root."""
        found, build, body = self.found, self.build, self.found.body
        hidden = [self.flat.hidden(p.hidden.build(build)) for p in found.products]
        columns = [n for n in roots if n in found.values]
        totals = [n for n in roots if n in found.totals]
        turned = [n for n in roots if n in found.columns]
        results = [found.values[n] for n in columns]
        sums = [self._sum(found.totals[n]) for n in totals]
        matrices = [found.columns[n] for n in turned]
        smooth = [n in body.smooth for n in (*results, *sums, *matrices)]
        inputs = [*found.logits, *found.row_inputs, *found.whole_inputs]
        text = spell(inputs, results, sums, matrices)
        call = build(
            chunked_rows,
            hidden,
            [p.build_weight(build) for p in found.products],
            [cut(given, found, self.flat) for given in found.row_inputs.values()],
            [whole(given, build) for given in found.whole_inputs.values()],
            text,
            self.chunk_bytes or 0,
            smooth,
            **self.options,
        )
        items = iter([build.item(call, i) for i in range(len(smooth))])
        made = {n: self._column(n, next(items)) for n in columns}
        made |= {n: self._total(n, next(items)) for n in totals}
        return made | {n: self._turned(n, next(items)) for n in turned}

    def _sum(self, total: Total) -> fx.Node:
        """The body's sum over rows of all terms."""
        body, columns = self.found.body, []
        for term in total.terms:
            column = body.wide(self._only(term))
            for factor in term.factors:
                column = self._times(column, factor(self.build))
            columns.append(column)
        whole = columns[0]
        for column in columns[1:]:
            whole = body(aten.add.Tensor, whole, column)
        return body(aten.sum.default, whole)

    def _only(self, term: Term) -> fx.Node:
        """A term's column, zero in rows that do not belong to it."""
        if term.rows == self.found.chosen:
            return term.column
        body, mask = self.found.body, self.flat.mask(term.rows)
        inside = body.input(f"rows_{len(self.found.row_inputs)}", mask, [SAMPLE])
        self.found.row_inputs[inside] = RowInput(mask, WHOLE)
        column = body(aten.unsqueeze.default, inside, 1)
        return body(aten.where.ScalarOther, column, term.column, 0)

    def _times(self, column: fx.Node, factor: Any) -> fx.Node:
        if isinstance(factor, fx.Node) and not isinstance(val(factor), torch.Tensor):
            device = val(column).device
            kind = {"dtype": torch.float64, "device": device}
            factor = self.build(aten.scalar_tensor.default, factor, **kind)
        if isinstance(factor, fx.Node):
            body = self.found.body.input(f"whole_{len(self.found.whole_inputs)}", factor, [])
            self.found.whole_inputs[body] = factor
            factor = body
        return self.found.body(aten.mul.Tensor, column, factor)

    def _column(self, node: fx.Node, result: fx.Node) -> fx.Node:
        """Values per row in the layout that the program had them in."""
        (place,) = self.found.flow.places(node)
        return self.flat.restored(result, place, shape_of(node))

    def _turned(self, node: fx.Node, columns: fx.Node) -> fx.Node:
        """One number per column, as the program had them."""
        if val(columns).dtype != val(node).dtype:
            columns = self.build(aten._to_copy.default, columns, dtype=val(node).dtype)
        one_row = val(node).dim() == 2
        return self.build(aten.unsqueeze.default, columns, 0) if one_row else columns

    def _total(self, node: fx.Node, total: fx.Node) -> fx.Node:
        for valid in self.found.totals[node].valid:
            total = self.build(aten.where.ScalarOther, valid(self.build), total, float("nan"))
        if val(total).dtype != val(node).dtype:
            total = self.build(aten._to_copy.default, total, dtype=val(node).dtype)
        shape = shape_of(node)
        return self.build(aten.reshape.default, total, [1] * len(shape)) if shape else total


def cut(given: RowInput, found: Translation, flat: Flat) -> fx.Node:
    """What a body takes row by row, laid out as ``(N, ...)``."""
    if given.node is None:
        device = val(found.products[0].node).device
        return flat.build(aten.arange.default, flat.count(flat.chosen), device=device)
    node, place = given.node, given.place
    if place is WHOLE:
        return node
    if given.like is not None:
        node = flat.expanded(node, place, given.like)
    return flat.operand(node, place)


def whole(given: Any, build: Builder) -> fx.Node:
    """What a body takes whole, without dims of one position."""
    node: fx.Node = given if isinstance(given, fx.Node) else given(build)
    ones = [d for d, size in enumerate(shape_of(node)) if size == 1]
    return build(aten.squeeze.dims, node, ones) if ones else node
