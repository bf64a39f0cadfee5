"""From a softmax back to the product it weighs: scale, masks, casts and views in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.passes.canonicalize.identity import same_sizes
from graphopt.passes.composites.expressions import (
    CASTS,
    COPIES,
    PRODUCTS,
    VIEWS,
    is_call,
    is_tensor,
    number,
    scaled,
)
from graphopt.passes.composites.products import Product, product_of
from graphopt.program import Program, operator_name, val
from graphopt.rewrite import Refusal, arguments

aten = torch.ops.aten

DEPTH = 12
MAXIMA = (aten.maximum.default, aten.max.other)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
CHOICES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)


@dataclass(frozen=True)
class Keep:
    """Scores stay where ``condition`` is ``when``; elsewhere they become ``fill``."""

    condition: fx.Node
    when: bool
    fill: float


@dataclass(frozen=True)
class Bias:
    """``sign * value`` is added to the scores; ``lead`` are batch sizes to give the value first."""

    value: fx.Node
    sign: float = 1.0
    lead: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Floor:
    """Scores below ``value`` become ``value``."""

    value: float


Mask = Keep | Bias | Floor


@dataclass
class Scores:
    """``softmax(masks(scale * product))``; masks are listed innermost first.

    Attributes:
        nodes: every node from the softmax's input to the product.
        work: node whose leading axes the masks refer to.
        view: sizes of the view between the product and ``work``, where there is one.
        factors: tensors that scale the product, constant over rows and columns.
    """

    product: Product
    scale: float
    factors: list[fx.Node]
    masks: list[Mask]
    nodes: list[fx.Node]
    work: fx.Node
    view: list[Any] | None = None


@dataclass
class _Walk:
    program: Program
    scale: float = 1.0
    factors: list[fx.Node] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    work: fx.Node | None = None
    view: list[Any] | None = None


def distance(node: Any) -> int | None:
    """Steps down to the nearest product, seen through what may stand between it and a softmax."""
    level, seen = [node] if is_tensor(node) else [], set()
    for steps in range(DEPTH):
        if any(is_call(n, *PRODUCTS) for n in level):
            return steps
        passed = [n for n in level if is_call(n, *_STEPS, *_OTHERS)]
        seen.update(level)
        level = [a for n in passed for a in dict.fromkeys(n.all_input_nodes) if a not in seen]
    return None


def read_scores(program: Program, node: fx.Node) -> Scores | Refusal:
    """Read what a softmax is taken of, or say which node stands in the way."""
    walk = _Walk(program)
    while not is_call(node, *PRODUCTS):
        walk.nodes.append(node)
        step = _STEPS.get(node.target)
        if step is None:
            name = operator_name(node.target)
            return Refusal(f"`{node.name}` ({name}) stands between the product and softmax", node)
        found = step(walk, node)
        if isinstance(found, Refusal):
            return found
        node = found
    product = product_of(program, node)
    if isinstance(product, Refusal):
        return product
    walk.nodes.append(node)
    if product.bias is not None and (refusal := _mask(walk, node, Bias(product.bias))):
        return refusal
    masks = walk.masks[::-1]
    scale = walk.scale * product.scale
    return Scores(product, scale, walk.factors, masks, walk.nodes, walk.work or node, walk.view)


def _mask(walk: _Walk, node: fx.Node, mask: Mask) -> Refusal | None:
    """Note a mask met on the way down: whatever scale was seen above it applies to it as well."""
    if walk.scale != 1.0 or walk.factors:
        if not isinstance(mask, Keep) or walk.factors or walk.scale < 0:
            return Refusal("the mask is scaled together with the scores", node)
        mask = Keep(mask.condition, mask.when, mask.fill * walk.scale)
    if walk.view is not None:
        regrouped = _regrouped(mask, node, walk.view)
        if regrouped is None:
            return Refusal("masks are applied to two shapes of the scores", node)
        mask = regrouped
    walk.work = walk.work or node
    walk.masks.append(mask)
    return None


def _regrouped(mask: Mask, node: fx.Node, view: list[Any]) -> Bias | None:
    """A bias on the scores before their view, to be viewed likewise."""
    if not isinstance(mask, Bias) or val(mask.value).dim() != val(node).dim():
        return None
    fits = same_sizes(val(mask.value).shape[:-2], val(node).shape[:-2])
    return Bias(mask.value, mask.sign, tuple(view[:-2])) if fits else None


def _cast(walk: _Walk, node: fx.Node) -> fx.Node | Refusal:  # noqa: ARG001
    source = node.args[0]
    if not val(source).dtype.is_floating_point:
        return Refusal("the scores are integers", node)
    return source


def _copy(walk: _Walk, node: fx.Node) -> fx.Node:  # noqa: ARG001
    return node.args[0]


def _view(walk: _Walk, node: fx.Node) -> fx.Node | Refusal:
    source = node.args[0]
    if not same_sizes(val(source).shape[-2:], val(node).shape[-2:]):
        return Refusal(f"`{node.name}` regroups the scores themselves", node)
    if walk.work is not None and walk.view is None:
        walk.view = list(node.args[1])
    return source


def _scale(walk: _Walk, node: fx.Node) -> fx.Node | Refusal:
    if found := scaled(walk.program, node):
        walk.scale *= found[1]
        return found[0]
    scores, factor = _nearer(*node.args[:2])
    rows = list(val(factor).shape[-2:]) if is_tensor(factor) else []
    one = len(rows) == 2 and same_sizes(rows, [1, 1])
    if node.target is not aten.mul.Tensor or not one or distance(scores) is None:
        return Refusal("the scale of the scores is not one number per head", node)
    walk.factors.append(factor)
    return scores


def _nearer(a: Any, b: Any) -> tuple[Any, Any]:
    """The two values, the one closer to a product first."""
    here, there = distance(a), distance(b)
    return (b, a) if there is not None and (here is None or there < here) else (a, b)


def _add(walk: _Walk, node: fx.Node) -> fx.Node | Refusal:
    sign = -1.0 if node.target is aten.sub.Tensor else 1.0
    if arguments(node)["alpha"] != 1:
        return Refusal("the mask is scaled as it is added", node)
    scores, mask = node.args[:2] if sign < 0 else _nearer(*node.args[:2])
    if distance(scores) is not None and number(walk.program, mask) is not None:
        return scores  # softmax does not see a constant shift
    if distance(scores) is None or not is_tensor(mask):
        return Refusal(f"`{node.name}` is not the sum of scores and a mask", node)
    return _mask(walk, node, Bias(mask, sign)) or scores


def _fill(walk: _Walk, node: fx.Node) -> fx.Node | Refusal:
    scores, condition, value = node.args
    fill = number(walk.program, value)
    if fill is None:
        return Refusal("hidden scores are replaced by a value that is not a number", node)
    return _mask(walk, node, Keep(condition, False, fill)) or scores


def _choose(walk: _Walk, node: fx.Node) -> fx.Node | Refusal:
    condition, chosen, other = node.args
    when = number(walk.program, other) is not None
    scores, value = (chosen, other) if when else (other, chosen)
    fill = number(walk.program, value)
    if fill is None or distance(scores) is None:
        return Refusal("hidden scores are replaced by a value that is not a number", node)
    return _mask(walk, node, Keep(condition, when, fill)) or scores


def _floor(walk: _Walk, node: fx.Node) -> fx.Node | Refusal:
    scores, other = node.args[:2]
    if number(walk.program, other) is None:
        scores, other = other, scores
    value = number(walk.program, other)
    if value is None or value > HIDDEN:
        return Refusal("the scores are bounded from below", node)
    return _mask(walk, node, Floor(value)) or scores


HIDDEN = -1e4
"""A score this low, or lower, takes part in no softmax that has another."""

Step = Callable[[_Walk, fx.Node], "fx.Node | Refusal"]
_STEPS: dict[Any, Step] = {
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(COPIES, _copy),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar), _scale),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _add),
    **dict.fromkeys(FILLS, _fill),
    **dict.fromkeys(CHOICES, _choose),
    **dict.fromkeys(MAXIMA, _floor),
}
_OTHERS = frozenset(
    {
        aten.tanh.default,
        aten.clamp.default,
        aten.neg.default,
        aten.transpose.int,
        aten.permute.default,
        aten.tril.default,
        aten.slice.Tensor,
    }
)
