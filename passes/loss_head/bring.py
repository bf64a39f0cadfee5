"""Bringing in what stands beside the rows: tensors are cut with them, cheap matrices made anew.

A mask ``labels[:, None] == labels`` or ``eye(n)`` has as many numbers as the product; the body
makes the rows of it that it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

from graphopt.analysis.axes import Placement, rule_of
from graphopt.analysis.axis_rules import pointwise
from graphopt.passes.loss_head.rows import RowInput, shape_of
from graphopt.program import val
from graphopt.rewrite import Refusal

if TYPE_CHECKING:
    from graphopt.passes.loss_head.translate import Translation

aten = torch.ops.aten

Found: TypeAlias = fx.Node | Refusal


def entered(t: Translation, value: fx.Node, place: Placement, at: fx.Node, shift: int) -> Found:
    """A value outside that broadcasts against ``at``, whose rows are at ``place``.

    Args:
        shift: dims that ``at`` has in front of the value's.
    """
    if not isinstance(val(value), torch.Tensor):
        return Refusal(f"`{value.name}` is a size", value)
    shape = shape_of(value)
    sized = [d for d in range(len(shape)) if shape[d] != 1]
    rows = [d for d in sized if d + shift in place.dims]
    if len(sized) - len(rows) > 1:
        return Refusal(f"`{value.name}` has further axes", value)
    if not rows:
        return t.whole(value)
    if t.late(value):
        return Refusal(f"`{value.name}` depends on other rows", value)
    if len(sized) > len(rows) and (made := _made(t, value, place, at, shift)) is not None:
        if not isinstance(made, Refusal):
            t.remade[value] = None
        return made
    if len(sized) > len(rows) and _is_table(t, rows, sized, place, shift):
        table = t.whole(value)
        return table if isinstance(table, Refusal) else t.of_group(table)
    if {d + shift for d in rows} != set(place.dims):
        return t.row_input(RowInput(value, place, at))
    return t.row_input(RowInput(value, place.moved({d + shift: d for d in rows})))


def _is_table(
    t: Translation, rows: list[int], sized: list[int], place: Placement, shift: int
) -> bool:
    """Whether a value has one row for each group."""
    groups = [leg.dim - shift for leg in place.legs if leg.step == 1 and leg.size == t.groups]
    return t.groups > 1 and rows == groups and rows + sized[-1:] == sized


def _made(
    t: Translation, value: fx.Node, place: Placement, at: fx.Node, shift: int
) -> Found | None:
    """A matrix computed in the body from less than a matrix; ``None`` where it must be given."""
    if value.target in (aten.expand.default, aten.expand_as.default):
        source: Any = value.args[0]
        return entered(t, source, place, at, shift + val(value).dim() - val(source).dim())
    if value.target is aten.eye.default:
        return _diagonal(t, value, place)
    if value.target is aten.one_hot.default:
        return _one_hot(t, value, place, shift)
    rule = rule_of(value.target) if value.op == "call_function" else None
    if rule not in (pointwise.elementwise, pointwise.same):
        return None

    def operand(a: Any) -> Any:
        if not isinstance(a, fx.Node):
            return a
        return entered(t, a, place, at, shift + val(value).dim() - val(a).dim())

    if rule is pointwise.same:
        main = operand(value.args[0])
        if isinstance(main, Refusal) or val(main).dtype == val(value).dtype:
            return main
        return t.body(aten._to_copy.default, main, dtype=val(value).dtype)
    args, kwargs = tuple(map(operand, value.args)), {k: operand(v) for k, v in value.kwargs.items()}
    refusals = [a for a in (*args, *kwargs.values()) if isinstance(a, Refusal)]
    return refusals[0] if refusals else t.body(value.target, *args, **kwargs)


def _one_hot(t: Translation, value: fx.Node, place: Placement, shift: int) -> Found | None:
    """``one_hot(labels)``: where the label is the class."""
    labels: Any = value.args[0]
    dims = {d: d - shift for d in place.dims}
    if set(dims.values()) != set(range(val(labels).dim())) or t.late(labels):
        return None
    column = t.row_input(RowInput(labels, place.moved(dims)))
    if isinstance(column, Refusal):
        return column
    same = t.body(aten.eq.Tensor, column, t.class_indices())
    return t.body(aten._to_copy.default, same, dtype=val(value).dtype)


def _diagonal(t: Translation, value: fx.Node, place: Placement) -> Found | None:
    """``eye(n)``: where the row's index is the class's."""
    if t.rows.held(place) != t.rows.every or t.chosen != t.rows.every or len(place.legs) != 1:
        return None
    rows = t.row_input(RowInput(None, place))
    assert isinstance(rows, fx.Node)
    same = t.body(aten.eq.Tensor, rows, t.class_indices())
    return t.body(aten._to_copy.default, same, dtype=val(value).dtype)
