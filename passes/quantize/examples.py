"""Products that are quantized, and look-alikes that keep their weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from graphopt.passes.quantize.cases import Cases
from graphopt.rewrite import Example

INPUTS, OUTPUTS = 64, 48


def _held() -> dict[str, nn.Parameter]:
    return {
        "w": nn.Parameter(torch.randn(OUTPUTS, INPUTS) / 8),
        "b": nn.Parameter(torch.randn(OUTPUTS)),
    }


_case = Cases(_held, (5, 7, INPUTS))


def examples() -> Iterator[Example]:
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    yield _case("plain", lambda m, x: F.linear(x, m.w, m.b).relu())
    yield _case("dynamic", lambda m, x: F.linear(x, m.w).relu(), dynamic_shapes=dynamic)
    yield _case("matmul", lambda m, x: (x @ m.w.T + m.b).relu())
    yield _case("one row", lambda m, x: F.linear(x, m.w, m.b).relu(), INPUTS)
    yield _case("bfloat16", lambda m, x: F.linear(x, m.w, m.b).relu(), kind=torch.bfloat16)
    yield _case("float16", lambda m, x: F.linear(x, m.w, m.b).relu(), kind=torch.float16)
    yield _case("twice", lambda m, x: F.linear(x, m.w).relu() + F.linear(x.tanh(), m.w))
    yield _case("strided", lambda m, x: F.linear(x.transpose(0, 1), m.w, m.b).relu())
    yield _case("written", lambda m, x: F.linear(x, m.w, m.b).mul_(2.0).relu_())
    yield _case("returned besides", lambda m, x: ((y := F.linear(x, m.w)).relu(), y.argmax(-1)))


def near_misses() -> Iterator[Example]:
    yield _case("head", lambda m, x: F.linear(x, m.w)[0], reason="output of the model")
    yield _case("tied", lambda m, x: F.linear(x, m.w).relu() + m.w.sum(), reason="reads the weight")
    yield _case(
        "training", lambda m, x: F.linear(x, m.w).relu(), training=True, reason="the model trains"
    )
    yield _case("no weight", lambda _, x: x @ x.transpose(1, 2))
    yield _case("wide", lambda m, x: F.linear(x, m.w).relu(), kind=torch.float64, reason="float64")
    yield Example(
        "infinite", _infinite, lambda: (torch.randn(5, INPUTS),), reason="NaN or infinity"
    )


def _infinite() -> nn.Module:
    model = _case.model(lambda m, x: F.linear(x, m.w).relu().clamp(max=1.0))
    with torch.no_grad():
        model.w[3, 4] = torch.inf
    return model
