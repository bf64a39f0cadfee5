"""Rotations of the heads of attention: of values, as they are written and as they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, fx

from graphopt.analysis.channels import NONE, Channels, Labels, follow
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.quantize import rotation_examples
from graphopt.passes.quantize.hadamard import rotation
from graphopt.passes.quantize.rotatable import folded, told
from graphopt.program import Program
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


class RotateHeads(Rule):
    """``A (V Q) Q.T = A V``: the values of each head are written and read in another basis.

    ``Q`` is as wide as a head, and the same for all. Which channels of a product are the values of
    a head, and which inputs of a later product they become, is decided by following them
    (`graphopt.analysis.channels`): merged projections and grouped heads need no case of their own.
    Ashkboos et al. 2024, "QuaRot", section 4 (stage 1c); "SpinQuant" calls it R2.

    Args:
        products: names of the products that will be quantized. Default: any.
    """

    profit = Profit.ALWAYS

    def __init__(self, products: frozenset[str] | None = None) -> None:
        self.products = products

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)

    def find(self, program: Program) -> Iterator[Candidate]:
        for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
            if type(self).__name__ in node.meta.get("rewritten_by", ()):
                continue
            match = _match(program, node)
            if match is not None and self._wanted(match):
                yield Candidate(match)

    def _wanted(self, match: Match) -> bool:
        ends = (match["channels"].producer, *match.roots)
        return self.products is None or any(n.name in self.products for n in ends)

    def check(self, match: Match) -> Refusal | None:
        channels: Channels = match["channels"]
        if not match.program.frozen:
            return Refusal("the model trains: its weights change", channels.producer)
        heads: Tensor | None = match["heads"]
        if heads is None or not bool(channels.free[heads].all()):
            node, reason = next(iter(channels.pins.items()))
            return Refusal(f"{told(node)} reads values of the heads: {reason}", node)
        if heads.unique().numel() < heads.numel():
            return Refusal("heads share some of their channels", channels.producer)
        for reader in match.roots:
            if _places(channels.readers[reader], heads) is None:
                reason = f"{told(reader)} reads parts of heads, or their channels in another order"
                return Refusal(reason, reader)
        return _weight_refusal(match)

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        channels, heads = match["channels"], match["heads"]
        producer = build.anchor = channels.producer
        given = arguments(producer)
        for name in ("weight", "bias"):
            if given[name] is not None:
                given[name] = _turned(given[name], heads, 0, build)
        build.substitute(producer, build(aten.linear.default, *given.values()))
        weights: dict[fx.Node, fx.Node] = {}
        return tuple(_read(n, channels.readers[n], heads, weights, build) for n in match.roots)

    def remark(self, match: Match) -> str:
        count, width = match["heads"].shape
        return f"`{match['channels'].producer.name}`: {count} heads of {width} values are rotated"

    def examples(self) -> Iterable[Example]:
        return rotation_examples.heads()

    def near_misses(self) -> Iterable[Example]:
        return rotation_examples.stuck_heads()


def _match(program: Program, producer: fx.Node) -> Match | None:
    """A product whose channels are summed up as values of heads, and the products that these
    reach; ``None`` if there are none."""
    channels = follow(program, producer, linear=True)
    heads = _heads(channels)
    inside = torch.zeros(len(channels.free) + 1, dtype=torch.bool)  # NONE is the last
    for row in channels.blocks if heads is None else heads:
        inside[row] = True
    inside[NONE] = False
    roots = tuple(n for n, labels in channels.readers.items() if bool(inside[labels].any()))
    if not roots:
        return None
    nodes = (producer, *channels.path, *roots)
    bound = {"channels": channels, "heads": heads}
    return Match(program, roots, nodes, bound, frozenset(channels.path))


def _heads(channels: Channels) -> Tensor | None:
    """``(H, D)``: the channels of each head, all as wide as the widest."""
    rows = [row for row in channels.blocks if len(row) > 1 and bool((row != NONE).all())]
    widest = max(map(len, rows), default=0)
    return torch.stack([r for r in rows if len(r) == widest]).unique(dim=0) if rows else None


def _places(labels: Labels, heads: Tensor) -> Tensor | None:
    """``(R, D)``: where inputs of a product are the channels of a head, in order; ``None`` unless
    every input that comes from a head is among them."""
    width = heads.shape[1]
    start = torch.isin(labels, heads[:, 0]).nonzero()[:, 0]
    start = start[start + width <= len(labels)]
    places = start[:, None] + torch.arange(width)
    row = {int(head[0]): head for head in heads}
    whole = all(torch.equal(labels[p], row[int(labels[p[0]])]) for p in places)
    covers = places.numel() == int(torch.isin(labels, heads).sum())
    return places if whole and covers else None


def _weight_refusal(match: Match) -> Refusal | None:
    """All weights must be constants that nothing else reads, or reads otherwise."""
    channels: Channels = match["channels"]
    held = [n for n in channels.producer.args[1:] if isinstance(n, fx.Node)]
    readers = {n: arguments(n)["weight"] for n in match.roots}
    for weight in (*held, *readers.values()):
        if not match.program.is_constant(weight):
            return Refusal("its weight is computed, not a parameter", weight)
        labels = [channels.readers[n] for n, read in readers.items() if read is weight]
        mine = {channels.producer} if weight in held else set(readers)
        other = next((u for u in weight.users if u not in mine), None)
        if other is not None:
            reason = f"the weight is also read by {told(other)}: a rotated copy would add memory"
            return Refusal(reason, weight)
        if any(not torch.equal(labels[0], more) for more in labels[1:]):
            return Refusal("two products read the heads with one weight, not alike", weight)
    return None


def _turned(weight: fx.Node, places: Tensor, axis: int, build: Builder) -> fx.Node:
    """A weight with the places ``(R, D)`` along an axis rotated, D at a time."""
    tensor = build.program.tensor(weight).detach()
    turned = tensor.movedim(axis, 0).clone()
    turned[places] = rotation(places.shape[1])(turned[places], 1)
    return folded(weight, turned.movedim(0, axis).contiguous(), build)


def _read(
    reader: fx.Node,
    labels: Labels,
    heads: Tensor,
    weights: dict[fx.Node, fx.Node],
    build: Builder,
) -> fx.Node:
    build.anchor = reader
    given = arguments(reader)
    places = _places(labels, heads)
    assert places is not None  # of what `check` lets through
    if given["weight"] not in weights:
        weights[given["weight"]] = _turned(given["weight"], places, 1, build)
    given["weight"] = weights[given["weight"]]
    made: fx.Node = build(aten.linear.default, *given.values())
    return made
