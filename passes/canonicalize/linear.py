"""Products with a weight, in whatever way they were written, become ``linear``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.passes.canonicalize.identity import RESHAPES, Identity, is_floating, same_sizes
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Numeric, Refusal, either, op, var

aten = torch.ops.aten

_PRODUCTS = (aten.matmul.default, aten.mm.default)
_MATRIX = var("w", lambda w: is_floating(w) and val(w).dim() == 2)
_ROW = var("bias", lambda b: is_floating(b) and val(b).dim() == 1)


def _product(weight: Any) -> Any:
    return either(op(_PRODUCTS, "x", weight), op(aten.addmm.default, _ROW, "x", weight))


class WeightRule(Identity):
    """An identity that holds for weights of the model, bound as ``owned``."""

    owned: ClassVar[str] = "w"

    def find(self, program: Program) -> Iterator[Candidate]:
        weights = program.weights()
        for candidate in super().find(program):
            if candidate.match is not None and candidate.match[self.owned] in weights:
                yield candidate


class TransposedWeight(WeightRule):
    """``x @ w.T + b = linear(x, w, b)``, for a weight of the model."""

    pattern = _product(op(aten.transpose.int, _MATRIX, 0, 1, escapes=True))

    def rewrite(self, match: Match, build: Builder) -> Any:
        return build(aten.linear.default, match["x"], match["w"], match.get("bias"))

    def examples(self) -> Iterable[Example]:
        yield _case("rows", lambda m, x: x @ m.w.transpose(0, 1))
        yield _case("tokens", lambda m, x: x @ m.w.transpose(0, 1), 2, 3)
        yield _case("addmm", lambda m, x: torch.addmm(m.b, x, m.w.transpose(0, 1)))
        yield _case("training", lambda m, x: x @ m.w.transpose(0, 1), 2, 3, training=True)
        yield _case("used twice", lambda m, x: x @ m.w.transpose(0, 1) @ m.w.transpose(0, 1))

    def near_misses(self) -> Iterable[Example]:
        yield _case("two inputs", lambda _, x: x @ x.transpose(0, 1))
        yield _case("scaled bias", lambda m, x: torch.addmm(m.b, x, m.w.transpose(0, 1), beta=2))
        yield _case("bias per row", lambda m, x: torch.addmm(m.b[:, None], x, m.w.transpose(0, 1)))


class PlainWeight(WeightRule):
    """``x @ w + b = linear(x, w.T, b)``, for weights stored input first, as in GPT-2's ``Conv1D``.

    The transposed copy replaces the weight where it is a constant; where the model trains it is a
    view. The product of the copy may round in another order.
    """

    numeric = Numeric.REASSOCIATED
    folds = True
    pattern = _product(_MATRIX)

    def check(self, match: Match) -> Refusal | None:
        weight = match["w"]
        other = next((u for u in weight.users if u is not match.root), None)
        if other is None or not match.program.is_constant(weight):
            return None
        return Refusal(
            f"`{other.name}` uses the weight too: a second copy would add memory", weight
        )

    def rewrite(self, match: Match, build: Builder) -> Any:
        weight = build(aten.transpose.int, match["w"], 0, 1)
        return build(aten.linear.default, match["x"], weight, match.get("bias"))

    def examples(self) -> Iterable[Example]:
        yield _case("rows", lambda m, x: x @ m.w)
        yield _case("tokens", lambda m, x: x @ m.w, 2, 3)
        yield _case("addmm", lambda m, x: torch.addmm(m.b, x, m.w))
        yield _case("training", lambda m, x: torch.addmm(m.b, x, m.w), training=True)
        yield _case("shared in training", lambda m, x: x @ m.w @ m.w, training=True)

    def near_misses(self) -> Iterable[Example]:
        yield _case("weight used twice", lambda m, x: x @ m.w @ m.w, reason="would add memory")
        yield _case("weight computed", lambda m, x: x @ (m.w * x.mean()))
        yield _case("weight on the left", lambda m, x: m.w @ x[:, :5].mT)
        yield _case("vector", lambda m, x: x @ m.b)


class BiasAfterLinear(WeightRule):
    """``linear(x, w) + b = linear(x, w, b)``, for a bias of the model: one pass less."""

    numeric = Numeric.REASSOCIATED
    owned = "bias"
    pattern = op(aten.add.Tensor, op(aten.linear.default, "x", "w", name="product"), _ROW)

    def applies(self, match: Match) -> bool:
        width, fake = match.val("w").shape[0], match.val("bias")
        return same_sizes(fake.shape, [width]) and bool(fake.dtype == match.val("w").dtype)

    def rewrite(self, match: Match, build: Builder) -> Any:
        return build(aten.linear.default, match["x"], match["w"], match["bias"])

    def examples(self) -> Iterable[Example]:
        yield _case("tokens", lambda m, x: F.linear(x, m.w) + m.b, 2, 3)
        yield _case("swapped", lambda m, x: m.b + F.linear(x, m.w))
        yield _case("training", lambda m, x: F.linear(x, m.w) + m.b, training=True)

    def near_misses(self) -> Iterable[Example]:
        yield _case("scaled", lambda m, x: F.linear(x, m.w).add(m.b, alpha=2))
        yield _case("residual", lambda m, x: F.linear(x, m.w) + x[0])
        yield _case("broadcast", lambda m, x: F.linear(x, m.w[:1]) + m.b)
        yield _case(
            "product used twice",
            lambda m, x: ((y := F.linear(x, m.w)) + m.b, y),
            reason="also an output",
        )


class FlatLinear(Identity):
    """``reshape(linear(reshape(x, (-1, d))), (*s, n)) = linear(reshape(x, (*s, d)))``.

    ``linear`` takes tokens in any number of leading dimensions; it flattens them itself.
    """

    numeric = Numeric.REASSOCIATED
    pattern = op(
        RESHAPES,
        op(
            aten.linear.default,
            op(RESHAPES, "x", ..., name="flat", escapes=True),
            "w",
            ...,
            name="product",
        ),
        "shape",
    )

    def applies(self, match: Match) -> bool:
        (*leading, last), (n, d) = val(match.root).shape, match.val("w").shape
        alone = len(match["flat"].users) == 1 or same_sizes(match.val("x").shape, [*leading, d])
        return alone and same_sizes([last], [n])

    def rewrite(self, match: Match, build: Builder) -> Any:
        sizes = [*match["shape"][:-1], match.val("w").shape[1]]
        tokens = build(aten.reshape.default, match["x"], sizes)
        return build(aten.linear.default, tokens, *match["product"].args[1:])

    def examples(self) -> Iterable[Example]:
        yield _case("tokens", lambda m, x: _flat(m, x).view(2, 3, 5), 2, 3)
        yield _case("inferred", lambda m, x: _flat(m, x).view(2, 3, -1), 2, 3)
        yield _case("other tokens", lambda m, x: _flat(m, x).view(3, 2, 5), 2, 3)
        yield _case("heads before", lambda m, x: _flat(m, x.mT).view(2, 5, 5), 2, 5)

    def near_misses(self) -> Iterable[Example]:
        yield _case("heads", lambda m, x: _flat(m, x).view(2, 3, 5, 1), 2, 3)
        yield _case(
            "used flat",
            lambda m, x: ((y := _flat(m, x)).view(2, 3, 5), y + 1),
            2,
            3,
            reason="also used by",
        )


class _Weighted(nn.Module):
    """A square weight ``w`` ``(5, 5)``, a bias ``b`` ``(5,)`` and what is computed with them."""

    def __init__(self, function: Callable[[_Weighted, Tensor], Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 5))
        self.b = nn.Parameter(torch.randn(5))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _flat(module: _Weighted, x: Tensor) -> Tensor:
    return F.linear(x.reshape(-1, 5), module.w, module.b)


def _case(name: str, function: Any, *leading: int, **options: Any) -> Example:
    """An example on a ``(*leading, 5)`` input, square by default: no shape gives an axis away."""
    sizes = (*(leading or (5,)), 5)
    return Example(name, lambda: _Weighted(function), lambda: (torch.randn(sizes),), **options)
