"""Products of two tensors as contractions: which axes meet, which stay, in what order.

Each axis of an operand has a label. A label of both operands that the result has not is summed
over; one that the result has is a batch axis. ``None`` labels an axis of size 1 that is broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.program import val
from graphopt.rewrite import Refusal, arguments

aten = torch.ops.aten

Labels = tuple[str | None, ...]


@dataclass(frozen=True)
class Contraction:
    """``result[out] = sum(operands[0][labels[0]] * operands[1][labels[1]]) + summand``."""

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    labels: tuple[Labels, Labels]
    out: Labels
    summand: fx.Node | None = None

    def axes(self, side: int) -> Axes:
        """What the axes are, seen from the operand ``side`` as the weight."""
        weight, x = self.labels[side], self.labels[1 - side]
        return Axes(
            batch=tuple(a for a in self.out if a in weight and a in x),
            rows=tuple(a for a in self.out if a not in weight),
            columns=tuple(a for a in self.out if a not in x),
            inner=tuple(a for a in weight if a is not None and a in x and a not in self.out),
        )

    @property
    def refusal(self) -> Refusal | None:
        """Why this is no product of matrices, if it is none."""
        first, second = self.labels
        named = [[a for a in labels if a is not None] for labels in (first, second)]
        if any(len(set(labels)) < len(labels) for labels in named):
            return Refusal("a diagonal of an operand is taken", self.node)
        if any(a not in self.out and a not in (*other, None) for a, other in _crossed(*named)):
            return Refusal("an operand is summed up by itself", self.node)
        if not self.axes(0).inner:
            return Refusal("nothing is summed over: this is no product of matrices", self.node)
        return None


@dataclass(frozen=True)
class Axes:
    """Labels of a contraction: of both operands and the result, of ``x``, of the weight, of both
    operands alone."""

    batch: Labels
    rows: Labels
    columns: Labels
    inner: Labels


def _crossed(first: list[str], second: list[str]) -> list[tuple[str, list[str]]]:
    return [*((a, second) for a in first), *((a, first) for a in second)]


def operands_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of a product, by position in the call; ``None`` where it is no product."""
    if node.op != "call_function" or node.target not in _READERS:
        return None
    names, _ = _READERS[node.target]
    given = arguments(node)
    found = given[names[0]] if len(names) == 1 else [given[name] for name in names]
    return tuple(found) if len(found) == 2 else None


def contraction_of(node: fx.Node) -> Contraction | Refusal:
    """Read a node that `operands_of` knows."""
    found = operands_of(node)
    assert found is not None
    made = _READERS[node.target][1](node, found, arguments(node))
    return made if isinstance(made, Refusal) else made.refusal or made


def _matmul(
    node: fx.Node, operands: tuple[fx.Node, fx.Node], _given: Mapping[str, Any]
) -> Contraction | Refusal:
    left, right = (val(x).shape for x in operands)
    first: list[str | None] = ["m", "k"] if len(left) > 1 else ["k"]
    second: list[str | None] = ["k", "n"] if len(right) > 1 else ["k"]
    out: list[str | None] = [a for a in (*first, *second) if a != "k"]
    for place in range(3, max(len(left), len(right)) + 1):
        sizes = [s[-place] if place <= len(s) else None for s in (left, right)]
        if not _broadcasts(*sizes):
            return Refusal("batch axes of a size that is not known meet", node)
        label = f"b{place}"
        for labels, size, other in zip((first, second), sizes, reversed(sizes), strict=True):
            if size is not None:
                labels.insert(0, None if _is_one(size) and not _is_one(other) else label)
        out.insert(0, label)
    if any(a not in (*first, *second) for a in out):
        return Refusal("both operands are broadcast", node)
    return Contraction(node, operands, (tuple(first), tuple(second)), tuple(out))


def _is_one(size: Any) -> bool:
    return size is None or bool(statically_known_true(size == 1))


def _broadcasts(a: Any, b: Any) -> bool:
    return _is_one(a) or _is_one(b) or bool(statically_known_true(a == b))


def _sum_of_products(
    names: str, node: fx.Node, operands: tuple[fx.Node, fx.Node], given: Mapping[str, Any]
) -> Contraction | Refusal:
    """``beta * self + alpha * product``, the labels of the product as in ``names``."""
    if given["alpha"] != 1 or given["beta"] not in (0, 1):
        return Refusal("the product or its summand is scaled", node)
    labels, out = _spelled(names)
    return Contraction(node, operands, labels, out, given["self"] if given["beta"] else None)


def _fixed(
    names: str, node: fx.Node, operands: tuple[fx.Node, fx.Node], _given: Mapping[str, Any]
) -> Contraction:
    labels, out = _spelled(names)
    return Contraction(node, operands, labels, out)


def _spelled(equation: str) -> tuple[tuple[Labels, Labels], Labels]:
    inputs, _, out = equation.partition("->")
    first, second = inputs.split(",")
    return (tuple(first), tuple(second)), tuple(out)


def _linear(
    node: fx.Node, operands: tuple[fx.Node, fx.Node], given: Mapping[str, Any]
) -> Contraction | Refusal:
    rows = tuple(f"r{i}" for i in range(val(operands[0]).dim() - 1))
    if val(operands[1]).dim() != 2:
        return Refusal("the weight is a vector", node)
    return Contraction(node, operands, ((*rows, "k"), ("n", "k")), (*rows, "n"), given["bias"])


def _inner(
    node: fx.Node, operands: tuple[fx.Node, fx.Node], _given: Mapping[str, Any]
) -> Contraction | Refusal:
    rows, columns = (
        tuple(f"{side}{i}" for i in range(val(x).dim() - 1))
        for side, x in zip("rc", operands, strict=True)
    )
    return Contraction(node, operands, ((*rows, "k"), (*columns, "k")), (*rows, *columns))


def _tensordot(
    node: fx.Node, operands: tuple[fx.Node, fx.Node], given: Mapping[str, Any]
) -> Contraction | Refusal:
    made: list[list[str | None]] = []
    for side, x, dims in zip(
        "rc", operands, (given["dims_self"], given["dims_other"]), strict=True
    ):
        labels: list[str | None] = [f"{side}{i}" for i in range(val(x).dim())]
        for place, dim in enumerate(dims):
            labels[dim] = f"k{place}"
        made.append(labels)
    out = tuple(a for a in (*made[0], *made[1]) if a is not None and a[0] != "k")
    return Contraction(node, operands, (tuple(made[0]), tuple(made[1])), out)


def _einsum(
    node: fx.Node, operands: tuple[fx.Node, fx.Node], given: Mapping[str, Any]
) -> Contraction | Refusal:
    text, arrow, result = given["equation"].replace(" ", "").partition("->")
    terms = text.split(",")
    if len(terms) != 2 or not arrow:
        return Refusal(f"the product {given['equation']!r} is not read", node)
    made = []
    for term, x in zip(terms, operands, strict=True):
        hidden = val(x).dim() - len(term.replace("...", ""))
        made.append(_unhidden(term, hidden))
    if "..." in terms[0] and "..." in terms[1]:
        return Refusal("both operands are broadcast", node)
    hidden = max(
        len(labels) - len(t.replace("...", "")) for labels, t in zip(made, terms, strict=True)
    )
    return Contraction(node, operands, (made[0], made[1]), _unhidden(result, hidden))


def _unhidden(term: str, hidden: int) -> Labels:
    """Labels of a term; an ellipsis stands for ``hidden`` axes."""
    before, dots, after = term.partition("...")
    return (*before, *(f".{i}" for i in range(hidden if dots else 0)), *after)


Reader = Callable[[fx.Node, tuple[fx.Node, fx.Node], Mapping[str, Any]], Contraction | Refusal]
_READERS: dict[Any, tuple[tuple[str, ...], Reader]] = {
    aten.linear.default: (("input", "weight"), _linear),
    aten.matmul.default: (("self", "other"), _matmul),
    aten.mm.default: (("self", "mat2"), _matmul),
    aten.bmm.default: (("self", "mat2"), partial(_fixed, "bmk,bkn->bmn")),
    aten.mv.default: (("self", "vec"), _matmul),
    aten.inner.default: (("self", "other"), _inner),
    aten.tensordot.default: (("self", "other"), _tensordot),
    aten.einsum.default: (("tensors",), _einsum),
    aten.addmm.default: (("mat1", "mat2"), partial(_sum_of_products, "mk,kn->mn")),
    aten.addmv.default: (("mat", "vec"), partial(_sum_of_products, "mk,k->m")),
    aten.baddbmm.default: (("batch1", "batch2"), partial(_sum_of_products, "bmk,bkn->bmn")),
    aten.addbmm.default: (("batch1", "batch2"), partial(_sum_of_products, "bmk,bkn->mn")),
}
PRODUCTS = frozenset(_READERS)
