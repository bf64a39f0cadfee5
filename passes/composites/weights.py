"""From a softmax forward to the product of its weights with the values."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt.passes.canonicalize.identity import same_sizes
from graphopt.passes.composites.expressions import (
    CASTS,
    COPIES,
    DROPOUTS,
    PRODUCTS,
    VIEWS,
    is_call,
    scaled,
)
from graphopt.passes.composites.products import Product, product_of
from graphopt.program import Program, operator_name, val
from graphopt.rewrite import Refusal, arguments

aten = torch.ops.aten

DEPTH = 6
_CHOICES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
MASKS = (aten.tril.default, aten.triu.default, *_FILLS, *_CHOICES)


@dataclass(frozen=True)
class Weighing:
    """``weights @ value``; ``nodes`` stand between the softmax and the product."""

    product: Product
    nodes: tuple[fx.Node, ...] = field(default=())


def read_weighing(program: Program, softmax: fx.Node) -> Weighing | Refusal | None:
    """Follow a softmax to the product it weighs; ``None`` where there is none."""
    path = _path(softmax)
    if path is None:
        return None
    *between, last = path
    before = softmax
    for node in between:
        if refusal := _obstacle(program, node, before):
            return refusal
        before = node
    product = product_of(program, last)
    if isinstance(product, Refusal):
        return product
    plain = product.left.plain and product.bias is None and product.scale == 1.0
    if product.left.node is not before or not plain:
        return Refusal("the weights are not the left factor of the product, as they are", last)
    return Weighing(product, tuple(between))


def _path(softmax: fx.Node) -> list[fx.Node] | None:
    """Nodes from the softmax (left out) to the nearest product, through operators on weights."""
    paths = [[softmax]]
    for _ in range(DEPTH):
        longer = [[*path, user] for path in paths for user in path[-1].users]
        for path in longer:
            if is_call(path[-1], *PRODUCTS):
                return path[1:]
        paths = [p for p in longer if is_call(p[-1], *_PASSED)]
    return None


_PASSED = frozenset(
    {
        *CASTS,
        *COPIES,
        *VIEWS,
        *DROPOUTS,
        *MASKS,
        operator.getitem,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.transpose.int,
        aten.permute.default,
    }
)


def _obstacle(program: Program, node: fx.Node, before: fx.Node) -> Refusal | None:
    """Why an operator between softmax and product forbids the composite, if it does."""
    if is_call(node, *CASTS):
        return None if val(node).dtype.is_floating_point else Refusal("weights are cast", node)
    if is_call(node, *COPIES):
        return None
    if is_call(node, *VIEWS) and same_sizes(val(before).shape[-2:], val(node).shape[-2:]):
        return None
    if is_call(node, *DROPOUTS):
        return _dropout(node)
    if node.target is operator.getitem:
        return None if node.args[1] == 0 else Refusal("the dropout mask is used", node)
    if is_call(node, *MASKS):
        return Refusal("the mask is applied after the softmax", node)
    if scaled(program, node) or is_call(node, aten.mul.Tensor, aten.div.Tensor):
        return Refusal("the weights are scaled after the softmax", node)
    return Refusal(f"`{node.name}` ({operator_name(node.target)}) changes the weights", node)


def _dropout(node: fx.Node) -> Refusal | None:
    p, train = arguments(node)["p"], arguments(node)["train"]
    active = p > 0 and train is not False
    return Refusal(f"dropout (p={p:g}) acts on the weights", node) if active else None
