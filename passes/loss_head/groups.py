"""Classes of several codebooks or classifiers from one product: a group is one more row dim."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from graphopt.analysis.axes import rule_of
from graphopt.analysis.axis_rules import pointwise
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.canonicalize.asserts import is_idle
from graphopt.passes.loss_head import grouped
from graphopt.passes.loss_head.heads import DYNAMIC, Head, case
from graphopt.passes.loss_head.needed import is_head
from graphopt.passes.loss_head.products import LargeProduct, large_products
from graphopt.program import Program, is_random, val
from graphopt.rewrite import (
    Builder,
    Candidate,
    Example,
    Match,
    Numeric,
    Pass,
    Profit,
    Rule,
    arguments,
)

aten = torch.ops.aten

_RESHAPES = (aten.reshape.default, aten.view.default)


class SplitClasses(Rule):
    """``reshape(f(x), (..., V)) = reshape(f(unflatten(x, -1, (G, V))), (..., V))``.

    ``x (*rows, G V)`` is a large product, ``f`` acts on each of its values or moves rows. Every
    view of the product then reads one node, whose classes are its last dim.
    """

    profit = Profit.ALWAYS
    numeric = Numeric.BITWISE
    benefit = 50
    folds = False

    def __init__(self, min_bytes: int = 0) -> None:
        self.min_bytes = min_bytes

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)

    def find(self, program: Program) -> Iterator[Candidate]:
        for product in large_products(program):
            last = product.class_dim == val(product.node).dim() - 1
            if product.groups > 1 or not last or product.bytes < self.min_bytes:
                continue
            if is_head(product) and (found := _splits(product)) is not None:
                inner, views, classes = found
                bound = {"product": product, "inner": frozenset(inner), "classes": classes}
                nodes = (product.node, *inner, *views)
                yield Candidate(Match(program, tuple(views), nodes, bound))

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        node, classes = match["product"].node, match["classes"]
        sizes = [val(node).shape[-1] // classes, classes]
        made = {node: build(aten.unflatten.int, node, -1, sizes)}
        split = _Split(build, match["inner"], sizes, made)
        return tuple(split.view(view) for view in match.roots)

    def examples(self) -> Iterable[Example]:
        for name, function in grouped.HEADS.items():
            if name not in grouped.UNSPLIT:
                yield case(name, function, training=True)
                yield case(f"{name}, dynamic", function, training=True, dynamic_shapes=DYNAMIC)

    def near_misses(self) -> Iterable[Example]:
        yield case("in parts", grouped.in_parts, training=True)
        yield case("read besides", grouped.of_both, training=True)
        yield case("returned whole", _returned, training=True)
        yield case("of an inner layer", _inner, training=True)
        yield case("two sizes", _two_sizes, training=True)
        yield case("kept whole", lambda m, h, _: m.logits(h).view(-1, m.w.shape[0]).amax(-1))


def _returned(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x = m.logits(h)
    return grouped.loss(grouped.split(x), grouped.labels(m, t)), x


def _inner(m: Head, h: Tensor, _: Tensor) -> Tensor:
    """Attention: heads on one product."""
    x = m.logits(h).unflatten(-1, (8, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(x, x, x).amax(-1)


def _two_sizes(m: Head, h: Tensor, _: Tensor) -> Tensor:
    x = m.logits(h)
    return x.unflatten(-1, (4, -1)).amax(-1).sum() + x.unflatten(-1, (8, -1)).amax(-1).sum()


def _splits(product: LargeProduct) -> tuple[list[fx.Node], list[fx.Node], int] | None:
    """What acts on single values, the views that split the classes behind it, and their last size;
    ``None`` where anything else reads the product."""
    whole, queue = val(product.node).shape[-1], [product.node]
    if not isinstance(whole, int):
        return None
    inner: dict[fx.Node, None] = {}
    views: dict[fx.Node, int] = {}
    while queue:
        for user in queue.pop().users:
            if user in inner or user in views or is_idle(user):
                continue
            if (size := _split_size(user, whole)) is not None:
                views[user] = size
            elif _keeps_classes(user, whole):
                inner[user] = None
                queue.append(user)
            else:
                return None
    sizes = {*views.values()}
    return (sorted(inner), list(views), sizes.pop()) if len(sizes) == 1 else None


def _split_size(node: fx.Node, whole: int) -> int | None:
    """The last size of a view that takes the last dim apart, or joins its parts with rows."""
    if node.target not in (*_RESHAPES, aten.unflatten.int):
        return None
    before, size = val(node.args[0]).shape, val(node).shape[-1]
    known = isinstance(size, int) and statically_known_true(before[-1] == whole)
    return size if known and 1 < size < whole and whole % size == 0 else None


def _keeps_classes(node: fx.Node, whole: int) -> bool:
    """Whether a node acts on single values, or moves rows, of which each stays whole."""
    if not isinstance(val(node), torch.Tensor) or is_random(node):
        return False
    main: Any = node.args[0]
    if not statically_known_true(val(node).shape[-1:] == (whole,)):
        return False
    if node.target in _RESHAPES:
        return True
    if node.target in _MOVES:
        return _MOVES[node.target](node, val(main).dim())
    if rule_of(node.target) not in (pointwise.elementwise, pointwise.same):
        return False
    tensors = [val(a) for a in node.all_input_nodes if isinstance(val(a), torch.Tensor)]
    return all(not t.dim() or t.shape[-1] in (1, whole) for t in tensors)


def _slices_rows(node: fx.Node, rank: int) -> bool:
    return bool(arguments(node)["dim"] % rank != rank - 1)


def _permutes_rows(node: fx.Node, rank: int) -> bool:
    return bool(arguments(node)["dims"][-1] % rank == rank - 1)


def _swaps_rows(node: fx.Node, rank: int) -> bool:
    given = arguments(node)
    return rank - 1 not in (given["dim0"] % rank, given["dim1"] % rank)


_MOVES: Mapping[Any, Any] = {
    aten.slice.Tensor: _slices_rows,
    aten.select.int: _slices_rows,
    aten.permute.default: _permutes_rows,
    aten.transpose.int: _swaps_rows,
}


@dataclass
class _Split:
    """Values whose last dim is split.

    Attributes:
        inner: nodes that are computed again on split operands.
        sizes: of the groups, and of the classes.
        made: value -> the same, split.
    """

    build: Builder
    inner: frozenset[fx.Node]
    sizes: list[int]
    made: dict[fx.Node, fx.Node]

    def view(self, node: fx.Node) -> fx.Node:
        """A view that splits the last dim, of what is split already."""
        main: Any = node.args[0]
        value = self._laid_out(main)
        if statically_known_true(val(value).shape == val(node).shape):
            return value
        given = arguments(node)
        if node.target is aten.unflatten.int:
            made: fx.Node = self.build(node.target, value, -2, given["sizes"][:-1])
        else:
            made = self.build(aten.reshape.default, value, _sizes(node))
        return made

    def of(self, node: fx.Node) -> fx.Node:
        if node not in self.made:
            self.made[node] = self._again(node) if node in self.inner else self._beside(node)
        return self.made[node]

    def _laid_out(self, node: fx.Node) -> fx.Node:
        """Row by row: views of rows that were moved ask more of their sizes."""
        value = self.of(node)
        if not any(n.target in _MOVES for n in self.inner):
            return value
        kept = {"memory_format": torch.contiguous_format}
        made: fx.Node = self.build(aten.clone.default, value, **kept)
        return made

    def _beside(self, node: fx.Node) -> fx.Node:
        """What stands beside the product."""
        fake = val(node)
        if not isinstance(fake, torch.Tensor) or not fake.dim():
            return node
        if fake.shape[-1] == 1:
            made: fx.Node = self.build(aten.unsqueeze.default, node, -1)
        else:
            made = self.build(aten.unflatten.int, node, -1, self.sizes)
        return made

    def _again(self, node: fx.Node) -> fx.Node:
        main: Any = node.args[0]
        given, rank, build = arguments(node), val(main).dim(), self.build
        if node.target in _RESHAPES:
            sizes = [*_sizes(node)[:-1], *self.sizes]
            made: fx.Node = build(aten.reshape.default, self._laid_out(main), sizes)
        elif node.target is aten.permute.default:
            made = build(node.target, self.of(main), [*(d % rank for d in given["dims"]), rank])
        elif node.target is aten.transpose.int:
            dims = (given["dim0"] % rank, given["dim1"] % rank)
            made = build(node.target, self.of(main), *dims)
        elif node.target in _MOVES:
            made = build(node.target, self.of(main), given["dim"] % rank, *node.args[2:])
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.of)
            made = build(node.target, *args, **kwargs)
        return made


def _sizes(node: fx.Node) -> list[Any]:
    given = arguments(node)
    return list(given["shape"] if node.target is aten.reshape.default else given["size"])
