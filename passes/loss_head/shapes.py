"""Operators that move positions about, of which nothing is left on rows, and parts of classes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.analysis.axes import Placement
from graphopt.passes.loss_head.registry import HANDLERS, Found, handles, name_of
from graphopt.program import val
from graphopt.rewrite import Refusal, arguments

if TYPE_CHECKING:
    from graphopt.passes.loss_head.translate import Translation

aten = torch.ops.aten


@handles(
    "alias", "clone", "contiguous", "expand", "expand_as", "flatten", "lift_fresh", "movedim",
    "narrow", "numpy_T", "permute", "reshape", "select", "slice", "squeeze", "swapaxes",
    "swapdims", "t",
    "transpose", "unflatten", "unsqueeze", "view", "view_as", "_unsafe_view",
)  # fmt: skip
def viewed(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found:
    """Nothing, or a slice of the classes."""
    main = given["self"]
    if t.width(main) == t.width(node):
        return t.values[main]
    before, after = t.classes.places(main), t.classes.places(node)
    return _of_classes(t, node, t.values[main], before, after)


def _of_classes(
    t: Translation,
    node: fx.Node,
    value: fx.Node,
    before: Sequence[Placement],
    after: Sequence[Placement],
) -> Found:
    """Some classes one after the other, or one of them."""
    if len(before) != 1 or len(before[0].legs) != 1 or len(after) != 1 or len(after[0].legs) > 1:
        return Refusal("it repeats or cuts what belongs to a row", node)
    step, size = (after[0].legs[0].step, after[0].legs[0].size) if after[0].legs else (1, 1)
    first = after[0].start - before[0].start
    if not isinstance(first, int) or not isinstance(size, int) or step != 1:
        return Refusal("it takes classes apart", node)
    return t.body(aten.slice.Tensor, value, 1, first, first + size)


@handles("cat", "concatenate")
def joined(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found:
    """Further classes of each row, from beside it."""
    parts, place = given["tensors"], t.place(node)
    dim = given["dim"] % val(node).dim()
    if place is None or dim in place.dims:
        return Refusal("rows of several tensors become one axis", node)
    found = [t.values[p] if p in t.values else t.beside(p, node, node) for p in parts]
    if refusal := next((f for f in found if isinstance(f, Refusal)), None):
        return refusal
    if any(p in t.values and t.place(p) != place for p in parts):
        return Refusal("rows meet other rows", node)
    return t.body(aten.cat.default, found, 1)


def item(t: Translation, node: fx.Node, _given: dict[str, Any]) -> Found:
    """One of several results."""
    several: Any = node.args[0]
    if HANDLERS.get(name_of(several)) is divided:
        return _part(t, node, several)
    return t.body(operator.getitem, t.values[several], node.args[1])


@handles("split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split")
def divided(t: Translation, _node: fx.Node, given: dict[str, Any]) -> Found:
    """Nothing yet: parts are rows, of which nothing is left, or slices of the classes."""
    return t.values[given["self"]]


def _part(t: Translation, node: fx.Node, several: fx.Node) -> Found:
    main = arguments(several)["self"]
    before, after = t.classes.places(main), t.classes.places(node)
    if before == after or t.width(main) == t.width(node):
        return t.values[several]
    return _of_classes(t, node, t.values[several], before, after)
