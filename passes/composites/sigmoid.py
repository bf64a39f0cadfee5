"""The logistic function written out by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.composites.examples import case, half
from graphopt.program import val
from graphopt.rewrite import Builder, Example, Match, Pass, Profit, Refusal, Rule, either, num, op

aten = torch.ops.aten

_NEGATED = either(op(aten.neg.default, "x"), op(aten.mul.Tensor, "x", num(-1)))
_DENOMINATOR = op(aten.add.Tensor, op(aten.exp.default, _NEGATED), num(1))


class RecognizeSigmoid(Rule):
    """``1 / (1 + exp(-x)) = sigmoid(x)``, and ``y / (1 + exp(-x)) = y sigmoid(x)``.

    Where ``exp(-x)`` overflows, the operator has a gradient; the original gives NaN.
    """

    profit = Profit.ALWAYS
    benefit = 4
    pattern: ClassVar[Any] = either(
        op(aten.reciprocal.default, _DENOMINATOR),
        op(aten.pow.Tensor_Scalar, _DENOMINATOR, num(-1)),
        op(aten.div.Tensor, "y", _DENOMINATOR),
    )

    def check(self, match: Match) -> Refusal | None:
        if not match.val("x").is_floating_point():
            return Refusal("exp of integers is computed in another dtype", match["x"])
        y = match.get("y")
        if y is not None and not _alike(y, match["x"]):
            return Refusal("the numerator is not a tensor of the same dtype", match.root)
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        sigmoid = build(aten.sigmoid.default, match["x"])
        y = match.get("y")
        return sigmoid if y is None else build(aten.mul.Tensor, y, sigmoid)

    def examples(self) -> Iterable[Example]:
        yield case("quotient", lambda x: 1 / (1 + torch.exp(-x)))
        yield case("reciprocal", lambda x: (torch.exp(-x) + 1.0).reciprocal() * 2)
        yield case("power", lambda x: (1 + (-1 * x).exp()) ** -1)
        yield case("silu", lambda x: x / (1 + torch.exp(-x)), training=True)
        yield case("gate", lambda x, y: y / (1 + torch.exp(-x)), *((2, 5, 8),) * 2)
        yield case("broadcast", lambda x, y: y / (1 + torch.exp(-x)), (2, 5, 8), (8,))
        yield case("bfloat16", lambda x: 1 / (1 + torch.exp(-x)), half(2, 5, 8))

    def near_misses(self) -> Iterable[Example]:
        yield case("not negated", lambda x: 1 / (1 + torch.exp(x)))
        yield case("two", lambda x: 1 / (2 + torch.exp(-x)))
        yield case("scaled", lambda x: 1 / torch.add(1, torch.exp(-x), alpha=2))
        yield case("rounded", lambda x: torch.div(x, 1 + torch.exp(-x), rounding_mode="floor"))
        yield case("exp used", _exp_used, reason="also used by")
        yield case("returned", lambda x: (1 / (d := 1 + torch.exp(-x)), d), reason="output")
        yield case(
            "integers", lambda x: 1 / (1 + torch.exp(-x)), lambda: torch.arange(6), reason="dtype"
        )
        yield case(
            "mixed dtypes",
            lambda x, y: y / (1 + torch.exp(-x)),
            half(2, 5, 8),
            (2, 5, 8),
            reason="same dtype",
        )

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)


def _alike(a: Any, b: fx.Node) -> bool:
    value = val(a) if isinstance(a, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype == val(b).dtype


def _exp_used(x: Tensor) -> Tensor:
    exp = torch.exp(-x)
    return 1 / (1 + exp) + exp.mean()
