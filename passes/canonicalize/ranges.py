"""What can be said about index tensors: ``arange`` under views, and masks that are always true."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.passes.canonicalize.views import ROW_MAJOR
from graphopt.program import val
from graphopt.rewrite import arguments

aten = torch.ops.aten

_MOVES = frozenset(
    {*ROW_MAJOR, aten.expand.default, aten.slice.Tensor, aten.alias.default, aten.clone.default,
     aten.permute.default, aten.transpose.int, aten.select.int}
)  # fmt: skip
"""Operators whose result holds values of their input only."""

_COMPARISONS: dict[Any, Any] = {aten.ge.Scalar: operator.ge, aten.gt.Scalar: operator.gt}
_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def counted_axis(node: Any) -> int | None:
    """The axis along which an index tensor counts 0, 1, 2, ...; every other axis has one element.

    ``None`` for any other tensor.
    """
    if not isinstance(node, fx.Node):
        return None
    source = _through(node, ROW_MAJOR)
    if source.target not in _ARANGES or not _counts_from_zero(source):
        return None
    wide = [i for i, n in enumerate(val(node).shape) if not (isinstance(n, int) and n == 1)]
    return wide[0] if len(wide) == 1 else None


def always_true(node: Any) -> bool:
    """Whether a boolean tensor is true everywhere, for every input."""
    if not isinstance(node, fx.Node) or not isinstance(val(node), Tensor):
        return False
    source = _through(node, _MOVES)
    if val(source).dtype is not torch.bool:
        return False
    if source.target in (aten.ones.default, aten.new_ones.default, aten.ones_like.default):
        return True
    if source.target in (aten.full.default, aten.full_like.default, aten.new_full.default):
        return arguments(source)["fill_value"] is True
    if source.target in (aten.logical_and.default, aten.bitwise_and.Tensor):
        return all(always_true(a) for a in source.args)
    compare = _COMPARISONS.get(source.target)
    least, bound = (
        least_value(source.args[0] if source.args else None),
        arguments(source).get("other"),
    )
    if compare is None or least is None or not isinstance(bound, int | float):
        return False
    return bool(compare(least, bound))


def least_value(node: Any) -> int | None:
    """A number that no element of an index tensor is below; ``None`` where nothing is known."""
    if not isinstance(node, fx.Node):
        return None
    source = _through(node, _MOVES)
    if source.target in _ARANGES:
        given = arguments(source)
        start, step = given.get("start", 0), given.get("step", 1)
        return start if type(start) is int and type(step) is int and step > 0 else None
    if source.target is aten.add.Tensor and arguments(source)["alpha"] == 1:
        below, added = least_value(source.args[0]), source.args[1]
        return below + added if below is not None and type(added) is int else None
    return None


def _counts_from_zero(arange: fx.Node) -> bool:
    given = arguments(arange)
    start, step = given.get("start", 0), given.get("step", 1)
    return type(start) is int and type(step) is int and (start, step) == (0, 1)


def _through(node: fx.Node, moves: Any) -> fx.Node:
    while node.target in moves and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
