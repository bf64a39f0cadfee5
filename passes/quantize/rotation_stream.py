"""Rotations of residual streams, folded into the weights of what writes and reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.quantize import rotation_examples
from graphopt.passes.quantize.hadamard import rotation
from graphopt.passes.quantize.rotatable import (
    Axes,
    Space,
    find_spaces,
    folded,
    held_by,
    reads_sizes,
    told,
)
from graphopt.passes.quantize.rotation_norms import before_rotating
from graphopt.passes.residual_stream import between
from graphopt.program import Program, val
from graphopt.rewrite import (
    Builder,
    Candidate,
    Example,
    Match,
    Pass,
    Profit,
    Refusal,
    Rule,
    arguments,
)

aten = torch.ops.aten

SHARE = 16
"""Products with the rotation itself may be this fraction of those it is folded into."""


class RotateStream(Rule):
    """``RMSNorm(Q x) = Q RMSNorm(x)``: writers write ``Q x``, and readers read with ``W Q.T``.

    ``Q`` is a Hadamard matrix with random signs, so that a feature that is large in every row
    becomes a little of all. Ashkboos et al. 2024, "QuaRot", section 4 (stage 1a); "SpinQuant" calls
    it R1. Where an end has no weight of its own to fold ``Q`` into (a norm with a scale before a
    tied head), values are multiplied by it, as long as that is little beside the other products.

    Args:
        products: names of the products that will be quantized; a stream that none of them reads or
            writes stays as it is. Default: any.
    """

    profit = Profit.ALWAYS

    def __init__(self, products: frozenset[str] | None = None) -> None:
        self.products = products

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(), *before_rotating(Canonicalize()))

    def find(self, program: Program) -> Iterator[Candidate]:
        for space in find_spaces(program):
            ends = [*space.readers, *space.values]
            wanted = self.products is None or any(n.name in self.products for n in ends)
            if wanted and space.inner and space.is_read_by_products() and not _is_rotated(space):
                yield Candidate(_match(program, space))

    def check(self, match: Match) -> Refusal | None:
        program, space = match.program, match["space"]
        if not program.frozen:
            return Refusal("the model trains: its weights change", match.root)
        if space.twisted is not None:
            return Refusal("the stream is transposed onto itself", space.twisted)
        entries, exits = space.entries(), space.exits()
        beside = (len(entries) + len(exits)) * space.width**2
        if SHARE * beside > _size(space) or space.folds.keys().isdisjoint(space.readers):
            return _unfoldable(entries, exits)
        sideways = [n for n in (*entries, *exits) if space.values[n] != val(n).dim() - 1]
        if sideways:
            return Refusal(f"{told(sideways[0])} holds features on another axis", sideways[0])
        return None

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        return _Rotated(match.program, match["space"], build).run(match.roots)

    def remark(self, match: Match) -> str:
        space: Space = match["space"]
        weights = {held_by(n)[0] for n in space.folds}
        beside = len(space.entries()) + len(space.exits())
        told = f"a stream of {space.width} features is rotated: {len(weights)} weights"
        return f"{told}, {beside} products" if beside else told

    def examples(self) -> Iterable[Example]:
        return rotation_examples.streams()

    def near_misses(self) -> Iterable[Example]:
        return rotation_examples.stuck_streams()


def _size(space: Space) -> int:
    """Numbers in the weights of products, once for each of these."""
    products = [n for n in space.folds if n.target is aten.linear.default]
    return sum(val(arguments(n)["weight"]).numel() for n in products)


def _unfoldable(entries: Sequence[fx.Node], exits: Mapping[fx.Node, fx.Node]) -> Refusal:
    """The first of the ends that no rotation can be folded into, and how many there are."""
    found = [(n, f"{told(n)} writes to the stream") for n in entries]
    found = [(v, f"{told(n)} reads the stream") for v, n in exits.items()] + found
    node, reason = found[0]
    also = f", nor into {len(found) - 1} others" if len(found) > 1 else ""
    return Refusal(f"{reason}, and no rotation can be folded into it{also}", node)


def _is_rotated(space: Space) -> bool:
    ends = (*space.readers, *space.values)
    return any(RotateStream.__name__ in n.meta.get("rewritten_by", ()) for n in ends)


def _match(program: Program, space: Space) -> Match:
    """Products that are folded, and values that others read, get new ones; between them lies
    whatever the layers compute."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    made = {*(n for n in space.readers if n in space.folds), *space.exits()}
    roots = tuple(sorted(made or space.normalised() or space.readers, key=order.__getitem__))
    ends = [n for n in (*space.values, *space.readers) if n.op == "call_function"]
    inside = between(program, ends)
    replaced = {n for n in space.values if n in space.inner or n in space.folds}
    sized = {n for n in replaced if any(reads_sizes(u, n) for u in n.users)}
    escapes = frozenset(inside) - {*roots, *(replaced - sized)}
    return Match(program, roots, tuple(inside), {"space": space}, escapes)


class _Rotated:
    """Builds a space again, rotated."""

    def __init__(self, program: Program, space: Space, build: Builder) -> None:
        self.program, self.space, self.build = program, space, build
        self.rotation = rotation(space.width)
        self.made: dict[fx.Node, fx.Node] = {}
        self.given: dict[fx.Node, fx.Node] = {}
        self.exits = space.exits()
        self.matrices: dict[Any, fx.Node] = {}
        self.weights: dict[tuple[fx.Node, Axes], fx.Node] = {}

    def run(self, roots: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """New nodes for products that read the space, and for values that are read as they were."""
        ends = {*self.space.values, *self.space.readers}
        for node in [n for n in self.program.graph.nodes if n in ends]:
            if node.op == "call_function":
                self.build.anchor = node
            self._visit(node)
        return tuple(self.given[root] for root in roots)

    def _visit(self, node: fx.Node) -> None:
        space, build = self.space, self.build
        if node in space.inner:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.made.get(n, n))
            new = build(node.target, *args, **kwargs)
        elif node in space.folds:
            new = self._folded(node)
        elif node in space.values:
            self.made[node] = self._product(node, inverse=False)
            return
        else:
            return
        self.given[node] = self._product(new, inverse=True) if node in self.exits else new
        if node in space.values:  # later nodes of the space may hold either as an argument
            self.made[node] = self.made[self.given[node]] = new
        if node.op == "call_function":
            build.substitute(node, self.given[node])

    def _folded(self, node: fx.Node) -> fx.Node:
        axes = self.space.folds[node]
        if node.op == "placeholder":
            return self._turned(node, axes)
        given = arguments(node)
        if node in self.space.readers:
            given["input"] = self.made[self.space.readers[node]]
        given["weight"] = self._turned(given["weight"], axes)
        if 0 in axes and given["bias"] is not None:
            given["bias"] = self._turned(given["bias"], axes & {0})
        new: fx.Node = self.build(node.target, *given.values())
        return new

    def _turned(self, weight: fx.Node, axes: Axes) -> fx.Node:
        if (weight, axes) not in self.weights:
            tensor = self.program.tensor(weight)
            for axis in sorted(axes):
                tensor = self.rotation(tensor, axis)
            self.weights[weight, axes] = folded(weight, tensor, self.build)
        return self.weights[weight, axes]

    def _product(self, value: fx.Node, *, inverse: bool) -> fx.Node:
        fake = val(value)
        key = (inverse, fake.dtype)
        if key not in self.matrices:
            matrix = self.rotation.matrix()
            matrix = (matrix.t() if inverse else matrix).to(fake.device, fake.dtype)
            name = f"rotation_{self.space.width}{'_inverse' if inverse else ''}"
            self.matrices[key] = self.build.state(name, matrix.contiguous())
        made: fx.Node = self.build(aten.matmul.default, value, self.matrices[key])
        return made
