"""Factors per channel, moved from what computes a value into the weights that read it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.channels import NONE, Channels, follow, source
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.quantize import scaling_examples
from graphopt.program import Program, operator_name, val
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
from graphopt.rewrite.match import MatchTrace

aten = torch.ops.aten
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
KEY = "channels_of"
"""Metadata of a node that stands for an earlier one, and the name by which factors know it."""


class ScaleChannels(Rule):
    """``W2 f(W1 x) = (W2 diag(t)) f(diag(1 / t) W1 x)`` where f passes factors per channel on.

    Which f do is decided by `graphopt.analysis.channels`. Lin et al. 2024, "AWQ", section 3.2, and
    Xiao et al. 2023, "SmoothQuant", section 4, use this step between layers of known names.

    Args:
        factors: by the name of the producer, ``(C,)`` float32; ``None`` where there are none
            because they are refused.
        stopped: names of products whose channels get no factors from anywhere.
    """

    profit = Profit.ALWAYS

    def __init__(
        self, factors: Mapping[str, Tensor | None], stopped: frozenset[str] = frozenset()
    ) -> None:
        self.factors, self.stopped = factors, stopped

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)

    def find(self, program: Program) -> Iterator[Candidate]:
        for node in program.graph.nodes:
            if key_of(node) in self.factors and (match := match_of(program, node)):
                yield Candidate(match)
            if key_of(node) in self.stopped:
                culprit = source(arguments(node)["input"])
                reason = f"`{node.name}` reads it, and no factors come from there"
                yield Candidate(trace=MatchTrace(1, culprit, f"{named(culprit)}: {reason}"))

    def check(self, match: Match) -> Refusal | None:
        if (found := refusal(match)) is not None:
            return found
        producer = match["channels"].producer
        if self.factors[key_of(producer)] is None:
            return Refusal("no factors were found for its channels", producer)
        return None

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        channels: Channels = match["channels"]
        producer = channels.producer
        wanted = self.factors[key_of(producer)]
        assert wanted is not None  # of what `check` lets through
        factors = torch.where(channels.free, wanted, 1.0)
        made = _divided(producer, factors, build)
        made.meta[KEY] = ""
        build.substitute(producer, made)
        weights: dict[fx.Node, Any] = {}
        return tuple(_read(n, channels.readers[n], factors, weights, build) for n in match.roots)

    def examples(self) -> Iterable[Example]:
        return scaling_examples.examples()

    def near_misses(self) -> Iterable[Example]:
        return scaling_examples.near_misses()


def named(node: fx.Node) -> str:
    return operator_name(node.target) if node.op == "call_function" else f"`{node.name}`"


def key_of(node: fx.Node) -> str:
    """The name by which factors know a node; products keep it when they are scaled."""
    return str(node.meta.get(KEY, node.name))


def match_of(program: Program, producer: fx.Node) -> Match | None:
    """The producer with the products that its factors reach, or would reach if not pinned."""
    if _scaled_operand(producer) is None:
        return None
    channels = follow(program, producer)
    reached = {n: labels for n, labels in channels.readers.items() if _any_free(labels, channels)}
    roots = tuple(reached or channels.readers)
    if not roots:
        return None
    nodes = (producer, *channels.path, *roots)
    return Match(program, roots, nodes, {"channels": channels}, frozenset(channels.path))


def _any_free(labels: Tensor, channels: Channels) -> bool:
    return bool(channels.free[labels[labels != NONE]].any())


def refusal(match: Match) -> Refusal | None:
    """Why factors may not be moved."""
    program, channels = match.program, match["channels"]
    if not program.frozen:
        return Refusal("the model trains: its weights change", channels.producer)
    if not any(_any_free(channels.readers[n], channels) for n in match.roots):
        node, reason = next(iter(channels.pins.items()))
        return Refusal(f"`{node.name}`: {reason}", node)
    producer = channels.producer
    if producer.target is aten.linear.default:
        held = [a for a in producer.args[1:] if isinstance(a, fx.Node)]
        if not all(map(program.is_constant, held)):
            return Refusal("its weight is computed, not a parameter", producer)
        if (reason := _shared(held[0], match)) is not None:
            return reason
    readers = (arguments(n)["weight"] for n in match.roots)
    return next(filter(None, (_shared(w, match) for w in readers)), None)


def _shared(weight: fx.Node, match: Match) -> Refusal | None:
    """A scaled copy beside a weight that others read would add memory."""
    others = [u for u in weight.users if u not in match.nodes]
    labels = [match["channels"].readers[u] for u in weight.users if u in match.roots]
    if not others and all(torch.equal(labels[0], other) for other in labels[1:]):
        return None
    by = f"`{others[0].name}`" if others else "another product"
    return Refusal(f"the weight is also read by {by}, where factors are not the same", weight)


def _scaled_operand(node: fx.Node) -> str | None:
    """The argument that takes the factors of a producer, if the node can be one."""
    if node.target is aten.linear.default:
        return "weight"
    if node.target in NORMS and len(arguments(node)["normalized_shape"]) == 1:
        return "weight"
    if node.target is aten.mul.Tensor:
        return next((n for n in ("other", "self") if _is_vector(arguments(node)[n], node)), None)
    return None


def _is_vector(operand: Any, node: fx.Node) -> bool:
    fake, whole = val(operand), val(node)
    if not (isinstance(operand, fx.Node) and operand.op == "placeholder"):
        return False
    return isinstance(fake, Tensor) and fake.dim() == 1 and fake.shape[0] == whole.shape[-1]


def _divided(producer: fx.Node, factors: Tensor, build: Builder) -> fx.Node:
    """The producer with its channels divided by factors."""
    given, name = arguments(producer), _scaled_operand(producer)
    assert name is not None  # of `match_of`
    dtype = val(given[name]).dtype if given[name] is not None else val(producer).dtype
    vector = build.state(f"{producer.name}_factors", factors.to(dtype))
    if producer.target is aten.linear.default:
        column = build(aten.unsqueeze.default, vector, 1)
        given["weight"] = build(aten.div.Tensor, given["weight"], column)
    elif given[name] is None:
        given["weight"] = build(aten.reciprocal.default, vector)
    else:
        given[name] = build(aten.div.Tensor, given[name], vector)
    if given.get("bias") is not None:
        given["bias"] = build(aten.div.Tensor, given["bias"], vector)
    made: fx.Node = build(producer.target, *given.values())
    return made


def _read(
    reader: fx.Node, labels: Tensor, factors: Tensor, weights: dict[fx.Node, Any], build: Builder
) -> fx.Node:
    """The product with its inputs multiplied by their factors."""
    given = arguments(reader)
    weight = given["weight"]
    if weight not in weights:
        mine = torch.where(labels == NONE, 1.0, factors[labels.clamp(min=0)])
        row = build.state(f"{reader.name}_factors", mine.to(val(weight).dtype))
        weights[weight] = build(aten.mul.Tensor, weight, row)
    made: fx.Node = build(aten.linear.default, given["input"], weights[weight], given["bias"])
    made.meta[KEY] = key_of(reader)
    return made
