"""Spellings of attention that become the composite, and look-alikes that must not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from graphopt.rewrite import Example

LOWEST = torch.finfo(torch.float32).min
Function = Callable[..., Any]


class Attend(nn.Module):
    """A function of ``q, k, v`` (and masks) as a module; ``causal`` and ``bias`` are buffers."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("causal", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))
        self.bias = nn.Parameter(torch.randn(3, 5, 5))

    def forward(self, *tensors: Tensor) -> Any:
        extra = {n: getattr(self, n) for n in ("causal", "bias") if n in self._wanted()}
        return self.function(*tensors, **extra)

    def _wanted(self) -> tuple[str, ...]:
        code = self.function.__code__
        return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def case(name: str, function: Function, *inputs: Any, **options: Any) -> Example:
    """An example whose inputs are given by shapes or makers; default: ``(2, 3, 5, 4)`` thrice."""
    given = inputs or ((2, 3, 5, 4),) * 3

    def make() -> tuple[Tensor, ...]:
        return tuple(i() if callable(i) else torch.randn(i) for i in given)

    return Example(name, lambda: Attend(function), make, **options)


QKV = ((2, 3, 5, 4),) * 3
FLAT = ((6, 5, 4),) * 3
ROWS = {0: Dim("batch"), 2: Dim("seq", max=15)}
DYNAMIC = {"tensors": (ROWS, ROWS, ROWS)}


def _visible() -> Tensor:
    return torch.rand(2, 1, 5, 5) > 0.4


def _padding() -> Tensor:
    return torch.ones(2, 1, 1, 5).masked_fill(torch.tensor([0, 0, 0, 0, 1]).bool(), 0.0)


def _row_hidden() -> Tensor:
    """The second row sees nothing: softmax makes it NaN."""
    return torch.tensor([[True] * 5, [False] * 5])


def _half(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape).bfloat16()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def buffered(q: Tensor, k: Tensor, v: Tensor, *, causal: Tensor) -> Tensor:
    """minGPT's mask: a triangle kept in a buffer, cut to the length."""
    length = q.shape[-2]
    hidden = causal[:, :, :length, :length] == 0
    return scores(q, k).masked_fill(hidden, -math.inf).softmax(-1) @ v


def learned(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor) -> Tensor:
    return (scores(q, k) + bias).softmax(-1) @ v


def hidden(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return scores(q, k).masked_fill(~m, -math.inf).softmax(-1) @ v


def ranged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    index = torch.arange(q.shape[-2])
    return torch.where(index[:, None] >= index, scores(q, k), -1e9).softmax(-1) @ v


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def regrouped(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """Three axes for the products, four for the mask, as OPT and BART had it."""
    grouped = torch.bmm(q * 0.5, k.transpose(1, 2)).view(2, 3, 5, 5) + m
    return torch.bmm(F.dropout(grouped.view(6, 5, 5).softmax(-1), 0.1, False), v)


def disentangled(q: Tensor, k: Tensor, v: Tensor, m: Tensor, p: Tensor) -> Tensor:
    """DeBERTa's: a bias in three axes, a mask in four."""
    grouped = (torch.bmm(q, k.mT) / 2 + m).view(2, 3, 5, 5).masked_fill(p, LOWEST)
    return torch.bmm(grouped.softmax(-1).view(6, 5, 5), v)


def scaled_per_head(q: Tensor, k: Tensor, v: Tensor, s: Tensor, m: Tensor) -> Tensor:
    """Swin v2's."""
    return (q @ k.mT * s.exp() + m.tanh()).softmax(-1) @ v


def windows(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = (torch.einsum("...qd,...kd->...qk", q, k) + m.tanh().unsqueeze(1)).softmax(-1)
    return torch.einsum("...qk,...kd->...qd", weights, v)


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """From ``(B, S, H, D)``, by einsum."""
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def alibi(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """Bloom's: the bias is the summand of the product."""
    return torch.bmm(torch.baddbmm(m, q, k.transpose(1, 2), alpha=0.5).softmax(-1), v)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, :, None].expand(2, 1, 3, 5, 4).reshape(2, 3, 5, 4) for t in (k, v))
    return plain(q, k, v)


def examples() -> Iterator[Example]:
    yield case("divided", plain)
    yield case("training", plain, training=True)
    yield case("dynamic", plain, dynamic_shapes=DYNAMIC)
    yield case("query scaled", lambda q, k, v: ((q * 0.5) @ k.mT).softmax(-1) @ v)
    yield case("both scaled", lambda q, k, v: ((q * 0.7) @ (k * 0.7).mT).softmax(3) @ v)
    yield case("einsum", tokens_first, *((2, 5, 3, 4),) * 3)
    yield case("three axes", lambda q, k, v: torch.bmm(q, k.mT).softmax(-1).bmm(v), *FLAT)
    yield case("two axes", plain, *((5, 4),) * 3)
    yield case("other lengths", plain, (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6))
    yield case("one key head", plain, (2, 3, 5, 4), (2, 1, 5, 4), (2, 1, 5, 4))
    yield case("repeated heads", grouped, (2, 3, 5, 4), (2, 1, 5, 4), (2, 1, 5, 4))
    yield case(
        "transposed key", lambda q, k, v: (q @ k).softmax(-1) @ v, QKV[0], (2, 3, 4, 5), QKV[0]
    )
    yield case("buffer", buffered, dynamic_shapes=DYNAMIC)
    yield case("buffer in training", buffered, training=True)
    yield case("ranges", ranged, dynamic_shapes=DYNAMIC)
    yield case("learned bias", learned)
    yield case("learned bias in training", learned, training=True)
    yield case("boolean mask", hidden, *QKV, _visible)
    yield case(
        "lowest where hidden",
        lambda q, k, v, m: scores(q, k).where(m, LOWEST).softmax(-1) @ v,
        *QKV,
        _visible,
    )
    yield case("float mask", lambda q, k, v, m: (m + scores(q, k)).softmax(-1) @ v, *QKV, (5, 5))
    yield case(
        "padding",
        lambda q, k, v, m: (scores(q, k) + (1.0 - m) * LOWEST).softmax(-1) @ v,
        *QKV,
        _padding,
    )
    yield case("hidden row", hidden, (2, 3, 2, 4), *QKV[1:], _row_hidden)
    yield case("regrouped", regrouped, *FLAT, (2, 1, 5, 5))
    yield case("two views", disentangled, *FLAT, (6, 5, 5), lambda: ~_visible())
    yield case("scaled per head", scaled_per_head, *QKV, (3, 1, 1), (3, 5, 5))
    yield case(
        "scaled per head, training", scaled_per_head, *QKV, (3, 1, 1), (3, 5, 5), training=True
    )
    yield case("windows", windows, *((2, 2, 3, 5, 4),) * 3, (2, 1, 5, 5))
    yield case(
        "filled, then scaled",
        lambda q, k, v, m: ((q @ k.mT).where(m, LOWEST) / 2).softmax(-1) @ v,
        *QKV,
        _visible,
    )
    yield case("summand", alibi, *FLAT, (6, 1, 5))
    yield case("softmax in float32", upcast, *(_half(2, 3, 5, 4),) * 3)


def near_misses() -> Iterator[Example]:
    yield case(
        "scaled after",
        lambda q, k, v: (q @ k.mT).softmax(-1) / 2 @ v,
        reason="scaled after the softmax",
    )
    yield case(
        "mask scaled",
        lambda q, k, v, m: ((q @ k.mT + m) / 2).softmax(-1) @ v,
        *QKV,
        (5, 5),
        reason="mask is scaled",
    )
    yield case(
        "mask after softmax",
        lambda q, k, v: scores(q, k).softmax(-1).tril() @ v,
        reason="after the softmax",
    )
    yield case(
        "over queries", lambda q, k, v: scores(q, k).softmax(-2) @ v, reason="not over the keys"
    )
    yield case(
        "permuted key",
        lambda q, k, v: (q @ k.permute(0, 2, 3, 1) * 0.5).softmax(-1) @ v,
        *((1, 4, 4, 4),) * 3,
        reason="permuted differently",
    )
    yield case(
        "dropout inside",
        lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.2, True) @ v,
        training=True,
        reason="dropout",
    )
    yield case(
        "weights returned",
        lambda q, k, v: ((w := scores(q, k).softmax(-1)) @ v, w),
        reason="output of the model",
    )
    yield case(
        "scores used",
        lambda q, k, v: ((s := scores(q, k)).softmax(-1) @ v) + s.mean(),
        reason="also used by",
    )
    yield case(
        "capped", lambda q, k, v: (scores(q, k) / 5).tanh().softmax(-1) @ v, reason="stands between"
    )
    yield case(
        "weak fill",
        lambda q, k, v, m: scores(q, k).masked_fill(~m, -5.0).softmax(-1) @ v,
        *QKV,
        _visible,
        reason="still counts",
    )
    yield case(
        "scaled per key",
        lambda q, k, v, m: (q @ k.mT * m).softmax(-1) @ v,
        *QKV,
        (5,),
        reason="not one number per head",
    )
    yield case(
        "hidden row in training",
        lambda q, k, v, m: (scores(q, k) + m).softmax(-1) @ v,
        *QKV,
        (5, 5),
        training=True,
        reason="hide a row",
    )
    yield case("class scores", lambda q, k, v: (q @ k.mT).softmax(-1) + v, *((5, 5),) * 3)
    yield case(
        "written in place",
        lambda q, k, v: scores(q, k).softmax(-1).mul_(2) @ v,
        reason="scaled after",
    )
