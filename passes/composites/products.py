"""The two matrix products of attention, whatever they were written with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from graphopt.passes.composites.expressions import CASTS, is_call, number, reordered, scaled
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Refusal, arguments

aten = torch.ops.aten


@dataclass(frozen=True)
class Operand:
    """``factor * node.permute(order)``; ``through`` lists the nodes between, outermost first."""

    node: fx.Node
    order: tuple[int, ...]
    factor: float = 1.0
    through: tuple[fx.Node, ...] = ()

    @property
    def leading(self) -> tuple[int, ...]:
        """Axes of ``node`` that act as batch axes."""
        return self.order[:-2]

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(val(self.node).shape[d] for d in self.order)

    @property
    def plain(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    def build(self, build: Builder) -> fx.Node:
        """The permuted tensor, without the factor."""
        return self.node if self.plain else build(aten.permute.default, self.node, list(self.order))


@dataclass(frozen=True)
class Product:
    """``scale * left @ right^T [+ bias]``: operands are ``(..., rows, contracted)``.

    Attributes:
        out: permutation from ``(batch..., row, column)`` to the axes of ``node``.
    """

    node: fx.Node
    left: Operand
    right: Operand
    scale: float = 1.0
    bias: fx.Node | None = None
    out: tuple[int, ...] = field(default=())


def identity(node: fx.Node) -> Operand:
    return Operand(node, tuple(range(val(node).dim())))


def swapped(operand: Operand) -> Operand:
    """The last two axes exchanged."""
    *lead, row, column = operand.order
    return replace(operand, order=(*lead, column, row))


def product_of(program: Program, node: fx.Node) -> Product | Refusal:
    """Read a product node; operands have at least two axes."""
    given = arguments(node)
    if node.target is aten.einsum.default:
        return _einsum(node, given["equation"], given["tensors"])
    if node.target is aten.baddbmm.default:
        return _baddbmm(program, node, given)
    left, right = node.args[:2]
    if min(val(left).dim(), val(right).dim()) < 2:
        return Refusal("a factor of the product is a vector", node)
    return _product(node, identity(left), swapped(identity(right)))


def _product(node: fx.Node, left: Operand, right: Operand, **rest: Any) -> Product:
    return Product(node, left, right, out=tuple(range(val(node).dim())), **rest)


def _baddbmm(program: Program, node: fx.Node, given: dict[str, Any]) -> Product | Refusal:
    alpha, beta = number(program, given["alpha"]), number(program, given["beta"])
    if alpha is None or beta not in (0.0, 1.0):
        return Refusal("the summand of the product is scaled", node)
    bias = given["self"] if beta else None
    left, right = identity(given["batch1"]), swapped(identity(given["batch2"]))
    return _product(node, left, right, scale=alpha, bias=bias)


def _einsum(node: fx.Node, equation: str, tensors: list[fx.Node]) -> Product | Refusal:
    """``b..., l, d`` times ``b..., s, d`` to ``b..., l, s`` in any order of the letters."""
    text = _spelled_out(equation.replace(" ", ""), tensors)
    inputs, arrow, result = text.partition("->")
    terms = inputs.split(",")
    if not arrow or "." in text or len(terms) != 2 or any(len(set(t)) < len(t) for t in terms):
        return Refusal(f"the product {equation!r} is not of two matrices", node)
    first, second = terms
    lead = [c for c in result if c in first and c in second]
    rows, columns = [c for c in result if c not in second], [c for c in result if c not in first]
    inner = [c for c in first if c in second and c not in result]
    if [len(rows), len(columns), len(inner)] != [1, 1, 1] or len(lead) + 2 != len(result):
        return Refusal(f"the product {equation!r} is not of two matrices", node)
    left = tuple(first.index(c) for c in (*lead, *rows, *inner))
    right = tuple(second.index(c) for c in (*lead, *columns, *inner))
    built = [*lead, *rows, *columns]
    out = tuple(built.index(c) for c in result)
    return Product(node, Operand(tensors[0], left), Operand(tensors[1], right), out=out)


def _spelled_out(equation: str, tensors: list[fx.Node]) -> str:
    """Letters in place of an ellipsis that stands for equally many axes everywhere."""
    terms = equation.partition("->")[0].split(",")
    hidden = [
        val(t).dim() - len(s.replace("...", "")) for s, t in zip(terms, tensors, strict=False)
    ]
    if len(set(hidden)) > 1 or any("..." not in s for s in terms):
        return equation
    return equation.replace("...", "ABCDEFGH"[: hidden[0]])


def peeled(program: Program, operand: Operand, dtype: torch.dtype) -> Operand:
    """Look through numbers multiplied on, upcasts from ``dtype``, and repeated permutations."""
    best = current = operand
    while (inner := _inside(program, current, dtype)) is not None:
        upcast = val(current.node).dtype != val(inner.node).dtype
        merged = current is best and not best.plain and inner.order != best.order
        current = inner
        if upcast or merged or inner.factor != best.factor:
            best = inner
    return best


def _inside(program: Program, operand: Operand, dtype: torch.dtype) -> Operand | None:
    node, through = operand.node, (*operand.through, operand.node)
    if found := scaled(program, node):
        return replace(operand, node=found[0], factor=operand.factor * found[1], through=through)
    if moved := reordered(node):
        order = tuple(moved[1][d] for d in operand.order)
        return replace(operand, node=moved[0], order=order, through=through)
    if is_call(node, *CASTS) and _is_upcast(val(node.args[0]).dtype, val(node).dtype, dtype):
        return replace(operand, node=node.args[0], through=through)
    return None


def _is_upcast(inner: torch.dtype, outer: torch.dtype, wanted: torch.dtype) -> bool:
    return inner == wanted and inner.is_floating_point and inner.itemsize < outer.itemsize


def origin(operand: Operand) -> Operand:
    """The operand as axes of the value that it was permuted from."""
    while moved := reordered(operand.node):
        order = tuple(moved[1][d] for d in operand.order)
        operand = replace(operand, node=moved[0], order=order)
    return operand


def crossed_axes(query: Operand, other: Operand) -> bool:
    """Whether batch axes of one operand meet token axes of the other.

    Told from layout alone: both stem from values of one kind and rank, permuted differently. Where
    heads and tokens are equally many the shapes fit all the same.
    """
    a, b = origin(query), origin(other)
    alike = a.node.op == b.node.op and (
        a.node.op == "placeholder" or a.node.target == b.node.target
    )
    same_rank = val(a.node).dim() == val(b.node).dim()
    return alike and same_rank and a.leading != b.leading
