"""Operators on rows: how each is spelled on matrices ``(n, width)`` and columns ``(n, 1)``.

A handler gives the body's node for a node of the program, a `Total` where rows are reduced too (a
mean over all tokens), or a `Refusal`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.analysis.axes import rule_of
from graphopt.analysis.axis_rules import pointwise
from graphopt.passes.loss_head.totals import Build, Term, Total, reciprocal
from graphopt.program import operator_name, val
from graphopt.rewrite import Builder, Refusal, arguments

if TYPE_CHECKING:
    from graphopt.passes.loss_head.translate import Translation

aten = torch.ops.aten

Found: TypeAlias = fx.Node | Refusal
Handler = Callable[["Translation", fx.Node, dict[str, Any]], "fx.Node | Total | Columns | Refusal"]
HANDLERS: dict[str, Handler] = {}


@dataclass(frozen=True)
class Columns:
    """``log sum exp`` of each column of a body's matrix, over all rows."""

    matrix: fx.Node


VIEWS = frozenset(
    {
        "alias", "clone", "contiguous", "expand", "expand_as", "flatten", "lift_fresh", "movedim",
        "narrow", "numpy_T", "permute", "reshape", "slice", "squeeze", "swapaxes", "swapdims", "t",
        "transpose", "unflatten", "unsqueeze", "view", "view_as", "_unsafe_view",
    }
)  # fmt: skip
"""Operators that move positions about: on rows nothing is left of them."""


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(function: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


def handler_of(node: fx.Node) -> Handler | None:
    """The handler for an operator; elementwise ones share theirs."""
    if node.target is operator.getitem:
        return item
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name.removeprefix("aten::")
    if name in VIEWS:
        return viewed
    if name in HANDLERS:
        return HANDLERS[name]
    rule = rule_of(node.target)
    if rule is pointwise.same:
        return converted
    return elementwise if rule is pointwise.elementwise else None


_SUMMARIES = frozenset(
    {
        "all", "amax", "amin", "any", "argmax", "argmin", "cross_entropy_loss", "gather",
        "logsumexp", "max", "mean", "min", "nll_loss", "nll_loss_nd", "sum", "topk",
    }
)  # fmt: skip


def summarises(node: fx.Node) -> bool:
    """Whether an operator leaves little of the classes, or of everything."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name.removeprefix("aten::")
    return name in _SUMMARIES or (name in HANDLERS and "reduction" in arguments(node))


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


def viewed(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found:
    """Nothing, or a slice of the classes."""
    main = given["self"]
    if t.width(main) == t.width(node):
        return t.values[main]
    before, after = t.classes.places(main), t.classes.places(node)
    if [len(p.legs) for p in (*before, *after)] != [1, 1]:
        return Refusal("it repeats or cuts what belongs to a row", node)
    first, size = after[0].start - before[0].start, after[0].legs[0].size
    if not isinstance(first, int) or not isinstance(size, int) or after[0].legs[0].step != 1:
        return Refusal("it takes classes apart", node)
    return t.body(aten.slice.Tensor, t.values[main], 1, first, first + size)


def item(t: Translation, node: fx.Node, _given: dict[str, Any]) -> Found:
    """One of several results."""
    return t.body(operator.getitem, t.values[node.args[0]], node.args[1])


@handles("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "flip")
def along_classes(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found:
    """Along the classes, which stay."""
    dims = given.get("dim", given.get("dims"))
    if refusal := t.only_classes(node, _dims(node, dims)):
        return refusal
    _, _, *others = node.args
    dim: Any = [1] if isinstance(dims, list) else 1
    return t.body(node.target, t.values[node.args[0]], dim, *others, **node.kwargs)


@handles("sum", "mean")
def reduced(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found | Total:
    """Over the classes in the body; over all rows besides, behind it."""
    dims, main = _dims(node, given.get("dim")), given["self"]
    name = operator_name(node.target).removeprefix("aten.").partition(".")[0]
    kind = _dtype(given)
    target = aten.sum.dim_IntList if name == "sum" else aten.mean.dim
    rows, width = set(t.row_dims(main)), t.width_dim(main)
    if not rows & dims:
        refusal = t.only_classes(node, dims)
        return refusal or t.body(target, t.values[main], [1], True, **kind)
    if not rows <= dims or (width is not None and width not in dims):
        return Refusal("it reduces some of the rows", node)
    column = t.body(target, t.values[main], [1], True, **kind)
    return over_rows(t, column, main, mean=name == "mean")


def over_rows(t: Translation, column: fx.Node, main: fx.Node, *, mean: bool) -> Total:
    """The sum, or the mean, of a column over the rows that ``main`` holds."""
    rows = t.rows_of(main)
    share: tuple[Build, ...] = (lambda build: reciprocal(build, t.count(rows)),)
    return Total((Term(column, rows, share if mean else ()),))


@handles(
    "amax", "amin", "argmax", "argmin", "logsumexp", "max", "min", "prod", "any", "all", "var",
    "std", "nansum", "nanmean", "count_nonzero", "linalg_vector_norm",
)  # fmt: skip
def summarised(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found | Columns:
    """One number per row; of log-sum-exps one per column too."""
    if "other" in given:
        return elementwise(t, node, given)
    if node.target is aten.logsumexp.default and _dims(node, given["dim"]) == {0}:
        main = given["self"]
        if t.row_dims(main) == (0,) and t.rows_of(main) == t.chosen == t.rows.every:
            return Columns(t.values[main])
    if refusal := t.only_classes(node, _dims(node, given.get("dim"))):
        return refusal
    wide = isinstance(given.get("dim"), list | tuple)
    names = list(given)
    args = {**given, "self": t.values[given["self"]], "dim": [1] if wide else 1}
    if "keepdim" in args:
        args["keepdim"] = True
        return t.body(node.target, *(args[n] for n in names if n != "dtype"), **_dtype(given))
    made = t.body(node.target, *(args[n] for n in names))
    return t.body(aten.unsqueeze.default, made, 1)


@handles("topk", "sort")
def ranked(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found:
    """Values and places of each row's classes, in the order of the values."""
    if refusal := t.only_classes(node, _dims(node, given["dim"])):
        return refusal
    return _called(t, node, {**given, "self": t.values[given["self"]], "dim": 1})


def _called(t: Translation, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    """The operator of a node on other arguments."""
    schema = node.target._schema  # type: ignore[union-attr]
    keywords = {a.name for a in schema.arguments if a.kwarg_only}
    args = [v for k, v in given.items() if k not in keywords]
    return t.body(node.target, *args, **{k: v for k, v in given.items() if k in keywords})


def _dtype(given: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": given["dtype"]} if given.get("dtype") is not None else {}


@handles("gather")
def gathered(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found:
    """Of each row, the classes that an index names."""
    main, index = given["self"], given["index"]
    if refusal := t.only_classes(node, _dims(node, given["dim"])):
        return refusal
    if not _same_rows(t, main, index):
        return Refusal("the index may name fewer rows than there are", index, _ONE_NAME)
    names = t.beside(index, main, node)
    if isinstance(names, Refusal):
        return names
    return t.body(aten.gather.default, t.values[main], 1, names)


_ONE_NAME = "dynamic_shapes, with one name for axes of one size"


def _same_rows(t: Translation, main: fx.Node, index: fx.Node) -> bool:
    sizes = [list(val(n).shape) for n in (main, index)]
    return all(statically_known_true(sizes[0][d] == sizes[1][d]) for d in t.row_dims(main))


@handles("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d")
def class_loss(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found | Total:
    """A loss per row; the mean weighs rows as torch does, by the weight of their class."""
    main, target, weight = given["self"], given["target"], given["weight"]
    rank = val(main).dim()
    if rank < 2 or t.width_dim(main) != 1:
        return Refusal("the classes of the loss are not those of the product", node)
    soft = val(target).dim() == rank
    placed = t.beside(target, main, node, without=None if soft else 1)
    heavy = t.whole(weight) if weight is not None else None
    for found in (placed, heavy):
        if isinstance(found, Refusal):
            return found
    if not soft:
        placed = t.body(aten.squeeze.dim, placed, 1)
    rest = [given["ignore_index"]]
    if node.target is aten.cross_entropy_loss.default:
        rest.append(given["label_smoothing"])
        target_op: Any = aten.cross_entropy_loss.default
    else:
        target_op = aten.nll_loss.default
    loss = t.body(target_op, t.values[main], placed, heavy, 0, *rest)
    column = t.body(aten.unsqueeze.default, loss, 1)
    if given["reduction"] == 0:
        return column
    if given["reduction"] == 2 or soft:
        return over_rows(t, column, main, mean=given["reduction"] == 1)
    mass = _Mass(given["target"], weight, given["ignore_index"])
    return Total((Term(column, t.rows_of(main), (mass.share,)),), (mass.some,))


@dataclass(frozen=True)
class _Mass:
    """What the mean of a loss is divided by: ``sum of weight[target]`` over targets that count."""

    target: fx.Node
    weight: fx.Node | None
    ignored: int

    def some(self, build: Builder) -> fx.Node:
        """Whether any target counts; the mean of none is NaN."""
        return build(aten.gt.Scalar, self._sum(build), 0)

    def share(self, build: Builder) -> fx.Node:
        mass = self._sum(build)
        return build(
            aten.reciprocal.default, build(aten.where.ScalarOther, self.some(build), mass, 1)
        )

    def _sum(self, build: Builder) -> fx.Node:
        counts = build(aten.ne.Scalar, self.target, self.ignored)
        if self.weight is None:
            return build(aten.sum.default, counts, dtype=torch.float64)
        safe = build(aten.reshape.default, build(aten.mul.Tensor, self.target, counts), [-1])
        each = build(aten.index_select.default, self.weight, 0, safe)
        counts = build(aten.reshape.default, counts, [-1])
        return build(aten.sum.default, build(aten.mul.Tensor, each, counts), dtype=torch.float64)


@handles(
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "l1_loss", "mse_loss",
    "smooth_l1_loss", "huber_loss", "soft_margin_loss", "poisson_nll_loss",
)  # fmt: skip
def elementwise_loss(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found | Total:
    """A value per element, summed or averaged over the classes here, over rows behind."""
    at = max((v for v in given.values() if t.place_of(v)), key=lambda n: val(n).dim())
    values = {k: t.operand(v, at) if isinstance(v, fx.Node) else v for k, v in given.items()}
    if refusal := next((v for v in values.values() if isinstance(v, Refusal)), None):
        return refusal
    for name in ("self", "target"):
        values[name] = t.body(aten.expand_as.default, values[name], t.values[at])
    values["reduction"] = 0
    each = _called(t, node, values)
    if given["reduction"] == 0:
        return each
    target = aten.mean.dim if given["reduction"] == 1 else aten.sum.dim_IntList
    column = t.body(target, each, [1], True)
    return over_rows(t, column, at, mean=given["reduction"] == 1)


def _dims(node: fx.Node, dims: Any) -> set[int]:
    """Dims that a call names, from the front; all where it names none."""
    main: Any = node.args[0]
    rank = val(main).dim()
    listed: Iterable[int]
    if dims is None or dims == []:
        listed = range(rank)
    else:
        listed = [dims] if isinstance(dims, int) else dims
    return {d % rank for d in listed} if rank else set()
