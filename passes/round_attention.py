"""Operands of attention rounded to half precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.kernels.rounded_attention import rounded_attention
from graphopt.program import Program, val
from graphopt.rewrite import (
    Builder,
    Candidate,
    Example,
    Match,
    Numeric,
    Pass,
    Profit,
    Refusal,
    Rule,
    arguments,
)

aten = torch.ops.aten


class RoundOperands(Rule):
    """``attention(q, k, v) = attention(r(q), r(k), r(v))`` but for the rounding ``r`` to 16 bits.

    Attention has no weight to quantize, but its products run at twice the rate or more in half
    precision; scores are scaled, masked and exponentiated in float32 (Micikevicius et al. 2018,
    "Mixed precision training", section 3.3). Scores of a size x are off by about ``x / 256`` in
    bfloat16, so attention that is very sure loses more: it is kept where the error on the inputs
    at hand is above `tolerance`.
    """

    numeric = Numeric.LOSSY
    profit = Profit.ALWAYS
    lift = "RoundAttention:tolerance"
    apart = True

    def __init__(self, dtype: str = "bfloat16", tolerance: float = 0.02) -> None:
        self.dtype, self.tolerance = dtype, tolerance

    def find(self, program: Program) -> Iterator[Candidate]:
        target = aten.scaled_dot_product_attention.default
        for node in program.graph.find_nodes(op="call_function", target=target):
            yield Candidate(Match(program, (node,), (node,)))

    def check(self, match: Match) -> Refusal | None:
        node, given = match.root, arguments(match.root)
        if not match.program.frozen:
            return Refusal("the model trains: torch.autocast is what rounds there", node)
        if given["dropout_p"]:
            return Refusal("attention drops weights at random", node)
        if (dtype := val(given["query"]).dtype) is not torch.float32:
            return Refusal(f"its operands are {dtype}, not float32", node)
        return None

    def rewrite(self, match: Match, build: Builder) -> Any:
        given = arguments(match.root)
        names = ("query", "key", "value", "attn_mask", "is_causal", "scale", "enable_gqa")
        return build(rounded_attention, *(given[name] for name in names), self.dtype)

    def examples(self) -> Iterable[Example]:
        axes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},) * 3
        yield _case("plain", lambda q, k, v: _attend(q, k, v))
        yield _case("dynamic", lambda q, k, v: _attend(q, k, v), dynamic_shapes=axes)
        yield _case("scaled", lambda q, k, v: _attend(q, k, v, scale=0.3))
        yield _case("causal", lambda q, k, v: _attend(q, k, v, is_causal=True))
        yield _case("mask", lambda q, k, v: _attend(q, k, v, attn_mask=_seen(q)))
        yield _case("added", lambda q, k, v: _attend(q, k, v, attn_mask=_far(q)))
        yield _case("hidden row", lambda q, k, v: _attend(q, k, v, attn_mask=_seen(q, 3)))
        yield _case("grouped", lambda q, k, v: _attend(q, k[:, :2], v[:, :2], enable_gqa=True))
        yield _case("other width", lambda q, k, v: _attend(q, k, v[..., :5]))
        yield _case("one query", lambda q, k, v: _attend(q[:, :, :1], k, v))
        yield _case("flat", lambda q, k, v: _attend(q[0], k[0], v[0]))
        yield _case("strided", lambda q, k, v: _attend(*(t.transpose(1, 2) for t in (q, k, v))))
        yield _case("returned too", lambda q, k, v: (_attend(q, k, v), q + k))

    def near_misses(self) -> Iterable[Example]:
        yield _case("trains", lambda q, k, v: _attend(q, k, v), training=True, reason="trains")
        yield _case(
            "half", lambda q, k, v: _attend(*(t.half() for t in (q, k, v))), reason="float16"
        )
        yield _case(
            "wide", lambda q, k, v: _attend(*(t.double() for t in (q, k, v))), reason="float64"
        )
        yield _case("dropout", lambda q, k, v: _attend(q, k, v, dropout_p=0.5), reason="at random")
        yield _case("by hand", lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v)


@dataclass(frozen=True)
class RoundAttention(Pass):
    """Attention multiplies in half precision; lossy. It belongs behind other passes.

    Attributes:
        dtype: what queries, keys, values and weights are rounded to. ``"float16"`` is nearer where
            scores stay below its 65,504; CPUs mostly are fast in ``"bfloat16"`` alone.
        tolerance: largest relative error of an attention's output; one with which it is larger is
            kept.

    Raises:
        ValueError: the tolerance is no positive number.
    """

    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance is a number between 0 and 1, not {self.tolerance!r}")

    def rules(self) -> Sequence[Rule]:
        return (RoundOperands(self.dtype, self.tolerance),)


class _Model(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.function(q.sin(), k, v)


def _attend(*operands: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(*operands, **options)


def _seen(query: Tensor, hidden: int | None = None) -> Tensor:
    """What each row sees: the first columns; one row nothing."""
    rows = torch.arange(query.shape[2], device=query.device)
    seen = rows[None] <= rows[:, None] + 2
    return seen if hidden is None else seen & (rows != hidden)[:, None]


def _far(query: Tensor) -> Tensor:
    rows = torch.arange(query.shape[2], device=query.device)
    return -0.3 * (rows[None] - rows[:, None]).abs().float()


def _case(name: str, function: Any, **options: Any) -> Example:
    return Example(
        name,
        lambda: _Model(function),
        lambda: tuple(torch.randn(2, 4, 6, 8) for _ in range(3)),
        **options,
    )
