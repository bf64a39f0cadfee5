"""Operators that compute on rows, spelled on matrices ``(n, width)`` and columns ``(n, 1)``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.passes.loss_head.registry import (
    Columns,
    Found,
    called,
    dims_named,
    handles,
    name_of,
    over_classes,
    over_rows,
)
from graphopt.passes.loss_head.totals import Total
from graphopt.program import val
from graphopt.rewrite import Refusal

if TYPE_CHECKING:
    from graphopt.passes.loss_head.translate import Translation

aten = torch.ops.aten


def elementwise(t: Translation, node: fx.Node, _given: dict[str, Any]) -> Found:
    """The same operator on operands that broadcast as rows do."""

    def operand(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return t.operand(value, node)
        return value

    args = tuple(map(operand, node.args))
    kwargs = {k: operand(v) for k, v in node.kwargs.items()}
    refusals = [v for v in (*args, *kwargs.values()) if isinstance(v, Refusal)]
    return refusals[0] if refusals else t.body(node.target, *args, **kwargs)


def converted(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found:
    """Casts, and copies of other kinds."""
    main = next(v for v in given.values() if isinstance(v, fx.Node))
    value = t.operand(main, node)
    if isinstance(value, Refusal):
        return value
    if val(main).device != val(node).device:
        return Refusal("it moves rows to another device", node)
    if node.target is aten.detach.default:
        return t.body(aten.detach.default, value)
    if val(main).dtype == val(node).dtype:
        return value
    return t.body(aten._to_copy.default, value, dtype=val(node).dtype)


@handles("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "flip")
def along_classes(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found:
    """Along the classes, which stay."""
    dims = given.get("dim", given.get("dims"))
    if refusal := t.only_classes(node, dims_named(node, dims)):
        return refusal
    _, _, *others = node.args
    dim: Any = [1] if isinstance(dims, list) else 1
    return t.body(node.target, t.values[node.args[0]], dim, *others, **node.kwargs)


@handles("sum", "mean", sums_up=True)
def reduced(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found | Total:
    """Over the classes in the body; over all rows besides, behind it."""
    dims, main = dims_named(node, given.get("dim")), given["self"]
    rows, width = set(t.row_dims(main)), t.width_dim(main)
    behind, mean = bool(rows & dims), name_of(node) == "mean"
    if behind and (not rows <= dims or (width is not None and width not in dims)):
        return Refusal("it reduces some of the rows", node)
    if not behind and (refusal := t.only_classes(node, dims)):
        return refusal
    column = over_classes(t, t.values[main], mean=mean, dtype=given.get("dtype"))
    return over_rows(t, column, main, mean=mean) if behind else column


@handles(
    "amax", "amin", "argmax", "argmin", "logsumexp", "max", "min", "prod", "any", "all", "var",
    "std", "nansum", "nanmean", "count_nonzero", "linalg_vector_norm", sums_up=True,
)  # fmt: skip
def summarised(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found | Columns:
    """One number per row; of log-sum-exps one per column too."""
    if "other" in given:
        return elementwise(t, node, given)
    if node.target is aten.logsumexp.default and dims_named(node, given["dim"]) == {0}:
        main = given["self"]
        if t.row_dims(main) == (0,) and t.rows_of(main) == t.chosen == t.rows.every:
            return Columns(t.values[main])
    if refusal := t.only_classes(node, dims_named(node, given.get("dim"))):
        return refusal
    wide = isinstance(given.get("dim"), list | tuple)
    args = {**given, "self": t.values[given["self"]], "dim": [1] if wide else 1}
    if "keepdim" in args:
        return called(t, node, {**args, "keepdim": True})
    return t.body(aten.unsqueeze.default, called(t, node, args), 1)


@handles("topk", "sort", sums_up=True)
def ranked(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found:
    """Values and places of each row's classes, in the order of the values."""
    if refusal := t.only_classes(node, dims_named(node, given["dim"])):
        return refusal
    return called(t, node, {**given, "self": t.values[given["self"]], "dim": 1})


@handles("gather", sums_up=True)
def gathered(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found:
    """Of each row, the classes that an index names."""
    main, index = given["self"], given["index"]
    if refusal := t.only_classes(node, dims_named(node, given["dim"])):
        return refusal
    if not _same_rows(t, main, index):
        return Refusal("the index may name fewer rows than there are", index, _ONE_NAME)
    names = t.beside(index, main, node)
    if isinstance(names, Refusal):
        return names
    return t.body(aten.gather.default, t.values[main], 1, names)


@handles("scatter", "scatter_add")
def scattered(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found:
    """Values written to, or added to, the classes of each row that an index names."""
    main = given["self"]
    if main not in t.values:
        return Refusal(f"`{main.name}` is written to", node)
    if refusal := t.only_classes(node, dims_named(node, given["dim"])):
        return refusal
    beside = {k: given[k] for k in ("index", "src") if isinstance(given.get(k), fx.Node)}
    if not all(_same_rows(t, main, n) for n in beside.values()):
        return Refusal("the index may name fewer rows than there are", node, _ONE_NAME)
    placed = {k: t.beside(n, main, node) for k, n in beside.items()}
    if refusal := next((v for v in placed.values() if isinstance(v, Refusal)), None):
        return refusal
    return called(t, node, {**given, **placed, "self": t.values[main], "dim": 1})


@handles("zeros_like", "ones_like", "full_like", "fill")
def constant(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found:
    """One number in every place."""
    number = given.get("fill_value", given.get("value", name_of(node) == "ones_like"))
    if isinstance(number, fx.Node):
        one = t.whole(number)
        refused = isinstance(one, Refusal)
        return one if refused else t.body(aten.fill.Tensor, t.values[given["self"]], one)
    if val(given["self"]).device != val(node).device:
        return Refusal("it moves rows to another device", node)
    like = t.body(aten.detach.default, t.values[given["self"]])
    return t.body(aten.full_like.default, like, number, dtype=val(node).dtype)


@handles("slice_scatter", "select_scatter")
def replaced(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found:
    """Some classes of each row, one after the other, taken from another tensor."""
    main, source = given["self"], given["src"]
    if main not in t.values:
        return Refusal(f"`{main.name}` is written to", node)
    dim = given["dim"] % val(main).dim()
    if refusal := t.only_classes(node, {dim}):
        return refusal
    one = "index" in given
    placed = t.beside(source, main, node, without=dim) if one else t.operand(source, node)
    if isinstance(placed, Refusal):
        return placed
    first = given["index"] if one else given["start"] or 0
    classes, count = val(main).shape[dim], 1 if one else val(source).shape[dim]
    if not all(isinstance(n, int) for n in (first, classes, count)) or given.get("step", 1) != 1:
        return Refusal("it takes classes apart", node)
    first = first + classes if first < 0 else min(first, classes)
    value, cut = t.values[main], aten.slice.Tensor
    parts = [t.body(cut, value, 1, 0, first), placed, t.body(cut, value, 1, first + count, classes)]
    return t.body(aten.cat.default, parts, 1)


_ONE_NAME = "dynamic_shapes, with one name for axes of one size"


def _same_rows(t: Translation, main: fx.Node, index: fx.Node) -> bool:
    sizes = [list(val(n).shape) for n in (main, index)]
    return all(statically_known_true(sizes[0][d] == sizes[1][d]) for d in t.row_dims(main))
