"""Bringing in what stands beside the rows: tensors are cut with them, cheap matrices made anew.

A mask ``labels[:, None] == labels`` or ``eye(n)`` has as many numbers as the product; the body
makes the rows of it that it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.analysis.axes import Placement, rule_of
from graphopt.analysis.axis_rules import pointwise
from graphopt.passes.loss_head.registry import called, dims_named, name_of
from graphopt.passes.loss_head.rows import RowInput, shape_of
from graphopt.program import val
from graphopt.rewrite import Refusal, arguments

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
    wide = len(sized) > len(rows)
    if (wide or _sums_made(value)) and (made := _made(t, value, place, at, shift)) is not None:
        if not isinstance(made, Refusal):
            t.remade[value] = None
        return made
    if wide and _is_table(t, rows, sized, place, shift):
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
    if name_of(value) in _CONSTANTS:
        return _constant(t, value, place, shift)
    if _is_sum(value):
        matrix = entered(t, value.args[0], place, at, shift)  # type: ignore[arg-type]
        dtype = arguments(value)["dtype"]
        kind = {} if dtype is None else {"dtype": dtype}
        refused = isinstance(matrix, Refusal)
        return matrix if refused else t.body(value.target, matrix, [1], True, **kind)
    rule = rule_of(value.target) if value.op == "call_function" else None
    along = _acts_along_classes(value, place, shift)
    if rule not in (pointwise.elementwise, pointwise.same) and not along:
        return None

    def operand(a: Any) -> Any:
        if not isinstance(a, fx.Node):
            return a
        return entered(t, a, place, at, shift + val(value).dim() - val(a).dim())

    if along:
        given = {k: operand(v) for k, v in arguments(value).items()}
        refusal = next((v for v in given.values() if isinstance(v, Refusal)), None)
        return refusal or called(t, value, given | {"dim": -1})
    if rule is pointwise.same:
        main = operand(value.args[0])
        if isinstance(main, Refusal) or val(main).dtype == val(value).dtype:
            return main
        return t.body(aten._to_copy.default, main, dtype=val(value).dtype)
    args, kwargs = tuple(map(operand, value.args)), {k: operand(v) for k, v in value.kwargs.items()}
    refusals = [a for a in (*args, *kwargs.values()) if isinstance(a, Refusal)]
    return refusals[0] if refusals else t.body(value.target, *args, **kwargs)


def _sums_made(value: fx.Node) -> bool:
    """Whether a column comes from sums of a matrix that is made of less, as counts of a mask do.

    Outside, torch would hold the matrix as integers of 8 bytes to count it.
    """
    if _is_sum(value):
        return _is_made(value.args[0])
    acts = rule_of(value.target) in (pointwise.elementwise, pointwise.same)
    return acts and any(_sums_made(a) for a in value.all_input_nodes)


def _is_sum(value: fx.Node) -> bool:
    if value.target is not aten.sum.dim_IntList:
        return False
    main: Any = value.args[0]
    return val(main).dim() > 1 and dims_named(value, value.args[1]) == {val(main).dim() - 1}


def _is_made(value: Any) -> bool:
    """Whether a matrix is computed from columns, rows and numbers."""
    shape = shape_of(value)
    if sum(n != 1 for n in shape) < 2 or shape[-1] == 1:
        return True
    if value.target in (aten.eye.default, aten.one_hot.default) or name_of(value) in _CONSTANTS:
        return True
    acts = rule_of(value.target) in (pointwise.elementwise, pointwise.same)
    acts = acts or value.target in (aten.expand.default, aten.expand_as.default)
    return acts and all(_is_made(a) for a in value.all_input_nodes)


_ALONG = ("softmax", "log_softmax", "_softmax", "_log_softmax", "scatter")
_CONSTANTS = {"zeros": 0, "new_zeros": 0, "zeros_like": 0, "ones": 1, "new_ones": 1, "ones_like": 1}
"""Operators that give one number everywhere."""


def _constant(t: Translation, value: fx.Node, place: Placement, shift: int) -> Found | None:
    """A matrix of one number, where it has the product's classes."""
    first = t.products[0]
    wide = [n for d, n in enumerate(val(value).shape) if d + shift not in place.dims and n != 1]
    classes = val(first.node).shape[first.class_dim]
    same = len(wide) == 1 and statically_known_true(wide[0] == classes)
    if not same or val(value).device != val(first.node).device:
        return None
    number = _CONSTANTS[name_of(value)]
    like = t.body(aten.detach.default, t.logits[0])
    return t.body(aten.full_like.default, like, number, dtype=val(value).dtype)


def _acts_along_classes(value: fx.Node, place: Placement, shift: int) -> bool:
    """Whether each row of a matrix comes from the same row of the operands."""
    if name_of(value) not in _ALONG:
        return False
    dim, shape = arguments(value)["dim"] % val(value).dim(), val(value).shape
    rows = [d for d in range(len(shape)) if d + shift in place.dims]
    return dim not in rows and all(
        val(a).dim() == len(shape)
        and all(statically_known_true(val(a).shape[d] == shape[d]) for d in rows)
        for a in value.all_input_nodes
    )


def _one_hot(t: Translation, value: fx.Node, place: Placement, shift: int) -> Found | None:
    """``one_hot(labels)``; scattered, so that a label that is no class is an error here too."""
    labels: Any = value.args[0]
    dims = {d: d - shift for d in place.dims}
    if set(dims.values()) != set(range(val(labels).dim())) or t.late(labels):
        return None
    column = t.row_input(RowInput(labels, place.moved(dims)))
    if isinstance(column, Refusal):
        return column
    first, classes = t.products[0], val(value).shape[-1]
    none = t.body(aten.detach.default, t.logits[0])
    if not statically_known_true(classes == val(first.node).shape[first.class_dim]):
        if not isinstance(classes, int):
            return None
        none = t.body(aten.slice.Tensor, none, 1, 0, classes)
    none = t.body(aten.full_like.default, none, False, dtype=torch.bool)
    same = t.body(aten.scatter.value, none, 1, column, True)
    return t.body(aten._to_copy.default, same, dtype=val(value).dtype)


def _diagonal(t: Translation, value: fx.Node, place: Placement) -> Found | None:
    """``eye(n)``: where the row's index is the class's."""
    if t.rows.held(place) != t.rows.every or t.chosen != t.rows.every or len(place.legs) != 1:
        return None
    rows = t.row_input(RowInput(None, place))
    assert isinstance(rows, fx.Node)
    same = t.body(aten.eq.Tensor, rows, t.class_indices())
    return t.body(aten._to_copy.default, same, dtype=val(value).dtype)
