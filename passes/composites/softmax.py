"""Softmax written out by hand."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.composites.examples import case
from graphopt.passes.composites.expressions import is_call
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


class RecognizeSoftmax(Rule):
    """``exp(x - max x) / sum exp(x - max x) = softmax(x)``; also ``exp(x - logsumexp x)``.

    Without a maximum subtracted the exponential overflows above 88 in float32, where ``softmax``
    does not: refused, because the two differ there.
    """

    profit = Profit.ALWAYS
    benefit = 6

    def find(self, program: Program) -> Iterator[Candidate]:
        for node in program.graph.find_nodes(op="call_function", target=aten.div.Tensor):
            if is_call(node.args[0], aten.exp.default) and is_call(
                node.args[1], aten.sum.dim_IntList
            ):
                yield from self._quotient(program, node)
        for node in program.graph.find_nodes(op="call_function", target=aten.exp.default):
            yield from self._normalised(program, node)

    def _quotient(self, program: Program, node: fx.Node) -> Iterator[Candidate]:
        exp, total = node.args[:2]
        given = arguments(total)
        if given["self"] is not exp or given["dtype"] is not None or not given["keepdim"]:
            return
        shifted = exp.args[0]
        found = _shift(shifted, given["dim"])
        bound: dict[str, Any] = {"x": found[0], "dim": given["dim"]} if found else {"x": shifted}
        inner = (shifted, *found[1]) if found else ()
        yield Candidate(Match(program, (node,), (node, exp, total, *inner), bound))

    def _normalised(self, program: Program, node: fx.Node) -> Iterator[Candidate]:
        shifted = node.args[0]
        if not is_call(shifted, aten.sub.Tensor) or not is_call(
            shifted.args[1], aten.logsumexp.default
        ):
            return
        total = shifted.args[1]
        given = arguments(total)
        if given["self"] is shifted.args[0] and given["keepdim"]:
            bound = {"x": given["self"], "dim": given["dim"]}
            yield Candidate(Match(program, (node,), (node, shifted, total), bound))

    def check(self, match: Match) -> Refusal | None:
        if "dim" not in match:
            return Refusal(
                "no maximum is subtracted: exp overflows where softmax does not", match.root
            )
        if len(match["dim"]) != 1:
            return Refusal("the sum runs over several axes", match.root)
        if not match.val("x").dtype.is_floating_point:
            return Refusal("softmax of integers", match.root)
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        return build(aten.softmax.int, match["x"], match["dim"][0])

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)

    def examples(self) -> Iterable[Example]:
        yield case("amax", by_hand)
        yield case("training", by_hand, training=True)
        yield case("other axis", lambda x: by_hand(x, 1))
        yield case("max with indices", _with_indices)
        yield case("logsumexp", lambda x: (x - x.logsumexp(-1, keepdim=True)).exp())

    def near_misses(self) -> Iterable[Example]:
        yield case(
            "no maximum", lambda x: (e := x.exp()) / e.sum(-1, keepdim=True), reason="overflow"
        )
        yield case("maximum of another axis", _other_maximum, reason="no maximum")
        yield case("other numerator", lambda x: x.exp() / (2 * x).exp().sum(-1, keepdim=True))
        yield case("sum returned", _sum_returned, reason="also an output")
        yield case("over all", _over_all, reason="several axes")


def _shift(node: Any, dim: list[int]) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """``x`` and the nodes of its maximum, where the node is ``x - max(x, dim)``."""
    if not is_call(node, aten.sub.Tensor) or not isinstance(node.args[1], fx.Node):
        return None
    x, top = node.args[:2]
    inner: tuple[fx.Node, ...] = (top,)
    while is_call(top, aten.detach.default):
        top = top.args[0]
        inner = (*inner, top)
    if is_call(top, operator.getitem) and top.args[1] == 0:
        top = top.args[0]
        inner = (*inner, top)
    if not is_call(top, aten.amax.default, aten.max.dim):
        return None
    given = arguments(top)
    axes = given["dim"] if isinstance(given["dim"], list | tuple) else [given["dim"]]
    rank = val(x).dim()
    same = {a % rank for a in axes} == {a % rank for a in dim}
    return (x, inner) if given["self"] is x and given["keepdim"] and same else None


def _shifted(x: Tensor, dim: int = -1) -> Tensor:
    return x - x.amax(dim, keepdim=True)


def by_hand(x: Tensor, dim: int = -1) -> Tensor:
    weights = _shifted(x, dim).exp()
    return weights / weights.sum(dim, keepdim=True)


def _with_indices(x: Tensor) -> Tensor:
    weights = torch.exp(x - x.max(-1, keepdim=True)[0].detach())
    return weights / torch.sum(weights, dim=-1, keepdim=True)


def _other_maximum(x: Tensor) -> Tensor:
    weights = _shifted(x, 1).exp()
    return weights / weights.sum(-1, keepdim=True)


def _sum_returned(x: Tensor) -> tuple[Tensor, Tensor]:
    weights = _shifted(x).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total, total


def _over_all(x: Tensor) -> Tensor:
    weights = torch.exp(x - x.amax((1, 2), keepdim=True))
    return weights / weights.sum((1, 2), keepdim=True)
