"""Losses on rows: a value per row, and its sum or mean over all of them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.passes.loss_head.registry import Found, called, handles, over_classes, over_rows
from graphopt.passes.loss_head.totals import Term, Total
from graphopt.program import val
from graphopt.rewrite import Builder, Refusal

if TYPE_CHECKING:
    from graphopt.passes.loss_head.translate import Translation

aten = torch.ops.aten


@handles("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d", sums_up=True)
def class_loss(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found | Total:
    """A loss per row; the mean weighs rows as torch does, by the weight of their class."""
    main, target, weight = given["self"], given["target"], given["weight"]
    rank = val(main).dim()
    if rank < 2 or t.width_dim(main) != 1:
        return Refusal("the classes of the loss are not those of the product", node)
    soft = val(target).dim() == rank
    placed = t.operand(target, main) if soft else t.beside(target, main, node, without=1)
    heavy = t.whole(weight) if weight is not None else None
    for found in (placed, heavy):
        if isinstance(found, Refusal):
            return found
    if soft:
        placed = t.body(aten.expand_as.default, placed, t.values[main])
    else:
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
        # A class that does not exist is the body's to refuse, which names the row.
        named = build(aten.mul.Tensor, self.target, counts)
        last = build(operator.sub, build.size(self.weight, 0), 1)
        safe = build(aten.reshape.default, build(aten.clamp.default, named, 0, last), [-1])
        each = build(aten.index_select.default, self.weight, 0, safe)
        counts = build(aten.reshape.default, counts, [-1])
        return build(aten.sum.default, build(aten.mul.Tensor, each, counts), dtype=torch.float64)


@handles("multi_margin_loss", sums_up=True)
def margin_loss(t: Translation, node: fx.Node, given: dict[str, Any]) -> Found | Total:
    """A loss per row from the distances to its target."""
    main = given["self"]
    target = t.beside(given["target"], main, node, without=1)
    heavy = t.whole(given["weight"]) if given["weight"] is not None else None
    if val(main).dim() != 2 or t.width_dim(main) != 1:
        return Refusal("the classes of the loss are not those of the product", node)
    if refusal := next((f for f in (target, heavy) if isinstance(f, Refusal)), None):
        return refusal
    flat = t.body(aten.squeeze.dim, target, 1)
    values = {**given, "self": t.values[main], "target": flat, "weight": heavy, "reduction": 0}
    column = t.body(aten.unsqueeze.default, called(t, node, values), 1)
    if given["reduction"] == 0:
        return column
    return over_rows(t, column, main, mean=given["reduction"] == 1)


@handles(
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "l1_loss", "mse_loss",
    "smooth_l1_loss", "huber_loss", "soft_margin_loss", "poisson_nll_loss", sums_up=True,
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
    each = called(t, node, values)
    if given["reduction"] == 0:
        return each
    mean = given["reduction"] == 1
    return over_rows(t, over_classes(t, each, mean=mean), at, mean=mean)
