"""One way to name a dimension."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.passes.canonicalize.identity import Identity, case, rebuilt
from graphopt.program import val
from graphopt.rewrite import Builder, Example, Match, arguments, op

aten = torch.ops.aten

_TARGETS = (
    aten.softmax.int,
    aten.log_softmax.int,
    aten._softmax.default,
    aten._log_softmax.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.var.correction,
    aten.std.correction,
    aten.var_mean.correction,
    aten.amax.default,
    aten.amin.default,
    aten.logsumexp.default,
    aten.argmax.default,
    aten.cumsum.default,
    aten.cat.default,
    aten.split_with_sizes.default,
)


class DimForm(Identity):
    """``mean(x, 2) = mean(x, -1)`` in three dimensions: the last is -1, any other counts from 0.

    Several dimensions ascend, from 0. So one pattern fits tensors of every rank.
    """

    pattern = op(_TARGETS, "x", ...)

    def applies(self, match: Match) -> bool:
        return bool(dim_form(match.root) != arguments(match.root)["dim"])

    def rewrite(self, match: Match, build: Builder) -> Any:
        return rebuilt(build, match.root, "dim", dim_form(match.root))

    def examples(self) -> Iterable[Example]:
        yield case("softmax", lambda x: x.softmax(2))
        yield case("mean", lambda x: x.mean(2, keepdim=True))
        yield case("several", lambda x: x.sum((-1, 1)))
        yield case("first", lambda x: x.softmax(-3))
        yield case("cat", lambda x: torch.cat([x, x], 2))
        yield case("by keyword", lambda x: x.var(dim=2, correction=0))

    def near_misses(self) -> Iterable[Example]:
        yield case("last", lambda x: x.softmax(-1) + x.mean(-1, keepdim=True))
        yield case("counted from 0", lambda x: x.softmax(1) + x.sum((1, 2), keepdim=True))
        yield case("all", lambda x: x.argmax() + x.sum())


def dim_form(node: fx.Node) -> Any:
    """The dimensions a call names, in the one form; as they are where it names none."""
    given = arguments(node)["dim"]
    first = val(node.args[0])
    rank = (first if isinstance(first, Tensor) else val(node)).dim()
    if isinstance(given, int):
        return _counted(given, rank)
    if not given:
        return given
    ascending = sorted(int(d) % rank for d in given)
    return [_counted(ascending[0], rank)] if len(ascending) == 1 else ascending


def _counted(dim: int, rank: int) -> int:
    positive = dim % rank if rank else 0
    return -1 if positive == rank - 1 else positive
