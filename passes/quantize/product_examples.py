"""Products that become ``linear`` before they are quantized, and look-alikes that do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.passes.quantize.cases import Cases
from graphopt.rewrite import Example

WIDTH = 32


def _held() -> dict[str, nn.Parameter]:
    """A matrix, a bias, a weight of heads, and a batch of matrices."""
    return {
        "w": nn.Parameter(torch.randn(WIDTH, WIDTH) / 6),
        "b": nn.Parameter(torch.randn(WIDTH)),
        "heads": nn.Parameter(torch.randn(WIDTH, 4, 8) / 6),
        "e": nn.Parameter(torch.randn(3, WIDTH, 16) / 6),
    }


case = Cases(_held, (3, 5, WIDTH))


def _dynamic(*dims: int) -> Any:
    return (dict.fromkeys(dims, torch.export.Dim.DYNAMIC),)


def _sliced(m: Any, x: Tensor) -> Tensor:
    first, second = m.w.split([12, 20])
    return F.linear(x, first, m.b[:12]).tanh().sum(-1) + F.linear(x, second).relu().sum(-1)


def _chained(m: Any, x: Tensor) -> Tensor:
    return (((x @ m.w).tanh()) @ m.w).tanh()


def examples() -> Iterator[Example]:
    yield case("read twice", _chained)
    yield case("on the left", lambda m, x: (m.w @ x.mT).relu())
    yield case("on the left of a vector", lambda m, x: (m.w @ x).relu(), WIDTH)
    yield case(
        "on the left, dynamic", lambda m, x: (m.w @ x.mT).relu(), dynamic_shapes=_dynamic(0, 1)
    )
    yield case("slices", _sliced)
    yield case("slices, dynamic", _sliced, dynamic_shapes=_dynamic(0, 1))
    yield case("part", lambda m, x: F.linear(x, m.w[3:9, :]).relu())
    yield case("rows of columns", lambda m, x: F.linear(x[..., :8], m.w[:, 8:16], m.b).relu())
    yield case("einsum", lambda m, x: torch.einsum("bld,de->bel", x, m.w).relu())
    yield case("heads", lambda m, x: torch.einsum("ibh,hnd->ibnd", x, m.heads).relu())
    yield case("heads back", lambda m, x: _heads_back(m, x), 3, 5, 4, 8)
    yield case("ellipsis", lambda m, x: torch.einsum("...d,de->...e", x, m.w).relu())
    yield case("tensordot", lambda m, x: torch.tensordot(x, m.w, ([1], [0])).relu(), 3, WIDTH, 5)
    yield case("inner", lambda m, x: torch.inner(x, m.w).relu())
    yield case("vector", lambda m, x: torch.mv(m.w, x).relu(), WIDTH)
    yield case("expanded", lambda m, x: torch.bmm(x, m.w.expand(3, WIDTH, WIDTH)).relu())
    yield case("one of a batch", lambda m, x: (x @ m.e[:1]).relu())
    yield case("all of a batch for one", lambda m, x: (x @ m.e).relu(), 5, WIDTH)
    yield case("summand", lambda m, x: torch.addmm(x, x, m.w).relu(), WIDTH, WIDTH)
    yield case("bias read twice", lambda m, x: torch.addmm(m.b, (x @ m.w), m.w).relu(), 4, WIDTH)
    yield case("summed batch", lambda m, x: torch.addbmm(x[0, :, :16], x, m.e).relu())
    yield case("bfloat16", _chained, kind=torch.bfloat16)
    yield case("float16", _chained, kind=torch.float16)
    yield case("strided", lambda m, x: (m.w @ x.transpose(0, 1).mT).relu())
    yield case("written", lambda m, x: (m.w @ x.mT).mul_(2.0).relu_())


def _heads_back(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("ibnd,hnd->ibh", x, m.heads).relu()


def near_misses() -> Iterator[Example]:
    yield case("head", lambda m, x: m.w @ x.mT, reason="output of the model")
    yield case("read twice, two ways", lambda m, x: (x @ m.w @ m.w.T).relu(), reason="held twice")
    yield case("summed", lambda m, x: (m.w @ x.mT).relu() + m.w.sum(), reason="held twice")
    yield case("overlapping", _overlapping, reason="held twice")
    yield case("vector", lambda m, x: (x @ m.b).relu(), reason="is a vector")
    yield case(
        "scaled", lambda m, x: torch.addmm(x, x, m.w, beta=2).relu(), WIDTH, WIDTH, reason="scaled"
    )
    yield case(
        "diagonal", lambda m, x: torch.einsum("bld,dd->bl", x, m.w).relu(), reason="diagonal"
    )
    yield case(
        "elementwise",
        lambda m, x: torch.einsum("bld,d->bld", x, m.b).relu(),
        reason="no product of",
    )
    yield case("computed", lambda m, x: (x @ (m.w * 2).mT).relu(), reason="computes the weight")
    yield case("two inputs", lambda _, x: (x @ x.mT).relu())
    yield Example("infinite", _infinite, lambda: (torch.randn(4, WIDTH),), reason="NaN or infinity")
    yield case("wide", lambda m, x: (m.w @ x.mT).relu(), kind=torch.float64, reason="float64")
    yield case("training", lambda m, x: (m.w @ x.mT).relu(), training=True)
    yield case("plain", lambda m, x: F.linear(x, m.w).relu())


def _overlapping(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w[:20]).relu().sum(-1) + F.linear(x, m.w[10:]).relu().sum(-1)


def _infinite() -> nn.Module:
    model = case.model(lambda m, x: (m.w @ x.mT).relu().clamp(max=1.0))
    with torch.no_grad():
        model.w[3, 4] = torch.inf
    return model
