"""Matrix products whose output has a row axis and a class axis."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from graphopt.kernels.chunked_rows import chunked_rows
from graphopt.program import Program, val
from graphopt.rewrite import Builder, arguments
from graphopt.room import extent, nbytes

aten = torch.ops.aten

PRODUCTS = frozenset(
    {
        aten.addmm.default,
        aten.baddbmm.default,
        aten.bmm.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.convolution.default,
        aten.einsum.default,
        aten.linear.default,
        aten.matmul.default,
        aten.mm.default,
        aten.scaled_dot_product_attention.default,
        chunked_rows,
    }
)
"""Operators that contract an axis of what they read."""


@dataclass(frozen=True)
class Factor:
    """``node.permute(order)``, its last dim contracted."""

    node: fx.Node
    order: tuple[int, ...]

    @property
    def sizes(self) -> tuple[Any, ...]:
        """All sizes but the contracted one."""
        return tuple(val(self.node).shape[d] for d in self.order[:-1])

    def build(self, build: Builder) -> fx.Node:
        if self.order == tuple(range(len(self.order))):
            return self.node
        return build(aten.permute.default, self.node, list(self.order))


@dataclass(frozen=True)
class LargeProduct:
    """``node = hidden weight^T [+ bias]``, ``hidden (*rows, D)`` and ``weight (V, D)``.

    Or ``hidden (*rows, D)`` with each of G matrices, one for each codebook or classifier: then the
    group is one more row dim, the last.

    Attributes:
        row_dims: the dims of ``node`` that are rows, in the order of ``hidden``.
        class_dim: the dim of ``node`` that is the classes.
        bias: ``(V,)``, of all groups.
        groups: G.
        base: the product of which ``node`` is a view, where it is one.
    """

    node: fx.Node
    hidden: Factor
    weight: Factor
    row_dims: tuple[int, ...]
    class_dim: int
    bias: fx.Node | None = None
    groups: int = 1
    base: fx.Node | None = None

    @property
    def made(self) -> fx.Node:
        """The node that multiplies."""
        return self.base or self.node

    def build_weight(self, build: Builder) -> fx.Node:
        """``(V, D)``, or ``(G, V, D)``."""
        weight = self.weight.build(build)
        if val(weight).dim() == 3 or self.groups == 1:
            return weight
        sizes = [self.groups, -1, build.size(weight, 1)]
        made: fx.Node = build(aten.reshape.default, weight, sizes)
        return made

    @property
    def bytes(self) -> int:
        """Bytes of the product for the example inputs; at most, where values decide its rows."""
        fake = val(self.node)
        if not any(map(has_free_unbacked_symbols, fake.shape)):
            return nbytes(fake)
        return _most_rows(self.hidden.node) * extent(fake.shape[self.class_dim]) * fake.itemsize

    @property
    def turned(self) -> LargeProduct | None:
        """The same product with rows and classes exchanged, where both are one dim."""
        if len(self.row_dims) != 1 or self.bias is not None or self.groups > 1:
            return None
        (row,) = self.row_dims
        turned = replace(self, hidden=self.weight, weight=self.hidden)
        return replace(turned, row_dims=(self.class_dim,), class_dim=row)


def _most_rows(node: fx.Node) -> int:
    """Rows of the nearest value, upwards from rows that were selected, whose sizes are known."""
    queue = deque([node])
    while queue:
        node = queue.popleft()
        fake = val(node)
        if isinstance(fake, torch.Tensor) and not any(map(has_free_unbacked_symbols, fake.shape)):
            return prod(map(extent, fake.shape[:-1]))
        queue.extend(node.all_input_nodes)
    return 0  # of no value that is known


def large_products(program: Program) -> Iterator[LargeProduct]:
    """Every product of rows with one matrix or several, in graph order."""
    weights = program.weights()
    for node in program.graph.nodes:
        if node.op == "call_function" and (found := _read(node, weights)) is not None:
            yield _grouped(found) or found


def _grouped(product: LargeProduct) -> LargeProduct | None:
    """A product that is read in groups of its classes alone, see `groups`."""
    (view, *others) = product.node.users or (product.node,)
    if others or view.target is not aten.unflatten.int or product.groups > 1:
        return None
    dim, rank = product.class_dim, val(product.node).dim()
    given = arguments(view)
    sizes = val(view).shape[dim:]
    if dim != rank - 1 or given["dim"] % rank != dim or len(sizes) != 2:
        return None
    if not all(isinstance(size, int) and size > 1 for size in sizes):
        return None
    rows = (*product.row_dims, dim)
    grouped = replace(product, node=view, base=product.node, groups=sizes[0])
    return replace(grouped, row_dims=rows, class_dim=dim + 1)


def _read(node: fx.Node, weights: Collection[fx.Node]) -> LargeProduct | None:
    given = arguments(node)
    if node.target is aten.linear.default:
        return _product(node, given["input"], given["weight"], False, given["bias"])
    if node.target is aten.mm.default:
        return _product(node, given["self"], given["mat2"], True)
    if node.target is aten.matmul.default:
        return _product(node, given["self"], given["other"], True)
    if node.target is aten.addmm.default and given["beta"] == given["alpha"] == 1:
        bias = given["self"]
        flat = val(bias).dim() == 1
        return _product(node, given["mat1"], given["mat2"], True, bias) if flat else None
    if node.target is aten.einsum.default and len(given["tensors"]) == 2:
        equation, pair = given["equation"].replace(" ", ""), given["tensors"]
        return _of_several(node, equation, pair, weights) or _einsum(node, equation, *pair)
    return None


def _product(
    node: fx.Node, left: fx.Node, right: fx.Node, as_columns: bool, bias: fx.Node | None = None
) -> LargeProduct | None:
    rank = val(left).dim()
    if val(right).dim() != 2 or rank < 2 or not val(node).is_floating_point():
        return None
    weight = Factor(right, (1, 0) if as_columns else (0, 1))
    hidden = Factor(left, tuple(range(rank)))
    return LargeProduct(node, hidden, weight, tuple(range(rank - 1)), rank - 1, bias)


def _einsum(node: fx.Node, equation: str, left: fx.Node, right: fx.Node) -> LargeProduct | None:
    """``...d, vd -> ...v`` in any order of the letters, the class letter from either side."""
    terms, arrow, result = equation.partition("->")
    first, second = terms.split(",")
    if not arrow or "." in equation or any(len(set(t)) < len(t) for t in (first, second, result)):
        return None
    if len(second) != 2:
        first, second, left, right = second, first, right, left
    inner = [c for c in first if c in second and c not in result]
    rows = [c for c in first if c in result and c not in second]
    classes = [c for c in second if c in result and c not in first]
    if [len(inner), len(classes), len(second)] != [1, 1, 2] or len(rows) + 1 != len(first):
        return None
    hidden = Factor(left, tuple(first.index(c) for c in (*rows, *inner)))
    weight = Factor(right, tuple(second.index(c) for c in (*classes, *inner)))
    dims = tuple(result.index(c) for c in rows)
    if not rows or not val(node).is_floating_point():
        return None
    return LargeProduct(node, hidden, weight, dims, result.index(classes[0]))


def _of_several(
    node: fx.Node, equation: str, pair: Sequence[fx.Node], weights: Collection[fx.Node]
) -> LargeProduct | None:
    """``...d, kvd -> ...kv``, the letters of each in any order; ``v`` is the last of the result."""
    terms, arrow, result = equation.partition("->")
    terms_of = dict(zip(pair, terms.split(","), strict=True))
    known = [n for n in terms_of if _source(n) in weights]
    if not arrow or "." in equation or len(known) != 1 or len(terms_of) != 2:
        return None
    (right,) = known
    (left,) = (n for n in pair if n is not right)
    first, second = terms_of[left], terms_of[right]
    twice = any(len(set(t)) < len(t) for t in (first, second, result))
    if len(second) != 3 or not val(node).is_floating_point() or twice:
        return None
    inner = [c for c in first if c in second and c not in result]
    rows = [c for c in first if c in result and c not in second]
    own = [c for c in result if c in second and c not in first]
    if [len(inner), len(own)] != [1, 2] or len(rows) + 1 != len(first) or not rows:
        return None
    group, classes = own
    size = val(right).shape[second.index(group)]
    hidden = Factor(left, tuple(first.index(c) for c in (*rows, *inner)))
    weight = Factor(right, tuple(second.index(c) for c in (group, classes, *inner)))
    dims = tuple(result.index(c) for c in (*rows, group))
    return LargeProduct(node, hidden, weight, dims, result.index(classes), None, size)


def _source(node: fx.Node) -> fx.Node:
    """What views and casts show."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node
