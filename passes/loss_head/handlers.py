"""The handler of each operator on rows."""

from __future__ import annotations

import operator

from torch import fx

from graphopt.analysis.axes import rule_of
from graphopt.analysis.axis_rules import pointwise
from graphopt.passes.loss_head import losses, shapes
from graphopt.passes.loss_head.algebra import converted, elementwise
from graphopt.passes.loss_head.registry import HANDLERS, SUMMARIES, Handler, name_of

__all__ = ["handler_of", "losses", "shapes", "summarises"]


def handler_of(node: fx.Node) -> Handler | None:
    """The handler for an operator; elementwise ones share theirs."""
    if node.target is operator.getitem:
        return shapes.item
    if (name := name_of(node)) in HANDLERS:
        return HANDLERS[name]
    rule = rule_of(node.target) if name else None
    if rule is pointwise.same:
        return converted
    return elementwise if rule is pointwise.elementwise else None


def summarises(node: fx.Node) -> bool:
    """Whether an operator leaves little of the classes, or of everything."""
    return name_of(node) in SUMMARIES
