"""Experts and batched products that are quantized, and look-alikes that keep their weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.passes.quantize.cases import Cases
from graphopt.rewrite import Example


def _held() -> dict[str, Tensor]:
    return {
        "w": nn.Parameter(torch.randn(4, 24, 32) / 6),
        "out": nn.Parameter(torch.randn(4, 32, 16) / 6),
        "ends": nn.Buffer(torch.tensor([3, 3, 10, 16], dtype=torch.int32)),
    }


_case = Cases(_held, (4, 5, 32))


def _grouped(m: Any, x: Tensor) -> Tensor:
    return torch._grouped_mm(x, m.w.mT, offs=m.ends).relu()


def _chained(m: Any, x: Tensor) -> Tensor:
    first = (x @ m.w).relu()
    return (first[..., :24] @ m.w).relu()


def examples() -> Iterator[Example]:
    dynamic = ({1: torch.export.Dim.DYNAMIC},)
    yield _case("batched", lambda m, x: (x @ m.out).relu())
    yield _case("batched, dynamic", lambda m, x: (x @ m.out).relu(), dynamic_shapes=dynamic)
    yield _case("bmm", lambda m, x: torch.bmm(x, m.w.mT).relu())
    yield _case("on the left", lambda m, x: torch.bmm(m.w, x.mT).relu())
    yield _case("bias", lambda m, x: torch.baddbmm(m.out[:, :1], x, m.out).relu())
    yield _case("einsum", lambda m, x: torch.einsum("esk,enk->sen", x, m.w).relu())
    yield _case("twice", lambda m, x: (x @ m.out).relu() + (x.tanh() @ m.out).relu())
    yield _case("one after the other", _chained, 4, 5, 24)
    yield _case("half", lambda m, x: torch.bmm(x, m.w.mT).relu(), kind=torch.float16)
    yield _case("grouped", _grouped, 16, 32, kind=torch.bfloat16)


def near_misses() -> Iterator[Example]:
    yield _case("head", lambda m, x: x @ m.out, reason="output of the model")
    yield _case("two ways", lambda m, x: ((x @ m.w.mT) @ m.w).relu(), reason="held twice")
    yield _case("summed", lambda m, x: (x @ m.out).relu() + m.out.sum(), reason="held twice")
    yield _case("two inputs", lambda _, x: (x @ x.mT).relu())
    yield _case("wide", lambda m, x: (x @ m.out).relu(), kind=torch.float64, reason="float64")
    yield _case("training", lambda m, x: (x @ m.out).relu(), training=True)
    yield _case("one matrix", lambda m, x: (x @ m.out[0]).relu())
