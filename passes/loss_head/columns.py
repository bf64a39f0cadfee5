"""The loss of columns: a cross entropy whose rows are the columns of a square matrix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.passes.canonicalize import Canonicalize
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


class LossOfColumns(Rule):
    """``cross_entropy(x^T, arange(n)) = mean(logsumexp(x, 0) - diagonal(x))`` for square ``x``.

    Rows and columns of ``x`` (Radford et al. 2021) are then summed up in one sweep over it. The
    reductions ``sum`` and ``none`` alike.
    """

    profit = Profit.ALWAYS
    benefit = 30

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)

    def find(self, program: Program) -> Iterator[Candidate]:
        for node in program.graph.find_nodes(
            op="call_function", target=aten.cross_entropy_loss.default
        ):
            turned: Any = node.args[0]
            if turned.target is aten.transpose.int and val(turned).dim() == 2:
                bound = {"x": turned.args[0], **arguments(node)}
                escapes = frozenset([turned])
                yield Candidate(Match(program, (node,), (node, turned), bound, escapes))

    def check(self, match: Match) -> Refusal | None:
        x, target = match.val("x"), match["target"]
        if target.target is not aten.arange.default or val(target).dtype is not torch.int64:
            return Refusal("the targets are not counted up", target)
        sizes = (x.shape[0], val(target).shape[0])
        if not all(statically_known_true(x.shape[1] == size) for size in sizes):
            return Refusal("the matrix may not be square", match["x"])
        if match["weight"] is not None or match["label_smoothing"] or match["ignore_index"] >= 0:
            return Refusal("classes are weighted, smoothed or ignored", match.root)
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        x = match["x"]
        index = build(aten.unsqueeze.default, match["target"], 1)
        own = build(aten.squeeze.dim, build(aten.gather.default, x, 1, index), 1)
        each = build(aten.sub.Tensor, build(aten.logsumexp.default, x, [0]), own)
        if match["reduction"] == 0:
            return each
        mean = match["reduction"] == 1
        return build(aten.mean.default if mean else aten.sum.default, each)

    def examples(self) -> Iterable[Example]:
        for reduction in ("mean", "sum", "none"):
            yield _case(reduction, reduction=reduction)
        yield _case("in training", train=True)

    def near_misses(self) -> Iterable[Example]:
        yield _case("smoothed", "smoothed", label_smoothing=0.1)
        yield _case("an entry ignored", "ignored", ignore_index=0)
        yield _case("weighted", "weighted", weight=torch.arange(1.0, 6.0))
        yield _case("other targets", "counted up", targets=lambda n: torch.arange(n).flip(0))
        yield _case("from 1 on", "counted up", targets=lambda n: torch.arange(1, n + 1) % n)


def _case(
    name: str, reason: str = "", *, targets: Any = torch.arange, train: bool = False, **options: Any
) -> Example:
    return Example(
        name,
        lambda: _Loss(targets, options),
        lambda: (torch.randn(5, 3), torch.randn(5, 3)),
        reason=reason,
        training=train,
    )


class _Loss(nn.Module):
    def __init__(self, targets: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.targets, self.options = targets, options

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x = a @ b.T
        return nn.functional.cross_entropy(x.T, self.targets(5), **self.options)
