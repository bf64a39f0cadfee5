"""Convolutions that are quantized, and look-alikes that keep their weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from graphopt.passes.quantize.cases import Cases
from graphopt.rewrite import Example


def _held() -> dict[str, nn.Parameter]:
    """Kernels of one to three dimensions, and a bias."""
    return {
        "w1": nn.Parameter(torch.randn(24, 16, 3) / 7),
        "w2": nn.Parameter(torch.randn(24, 16, 3, 2) / 10),
        "w3": nn.Parameter(torch.randn(24, 16, 2, 1, 3) / 10),
        "each": nn.Parameter(torch.randn(16, 1, 3, 3) / 3),
        "pairs": nn.Parameter(torch.randn(24, 8, 3, 3) / 9),
        "b": nn.Parameter(torch.randn(24)),
    }


_case = Cases(_held, (2, 16, 9, 8))


def examples() -> Iterator[Example]:
    batch = ({0: torch.export.Dim.DYNAMIC},)
    sizes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    yield _case("two dimensions", lambda m, x: F.conv2d(x, m.w2, m.b, padding=1).relu())
    yield _case("one dimension", lambda m, x: F.conv1d(x, m.w1, m.b, 2).relu(), 2, 16, 11)
    yield _case("three dimensions", lambda m, x: F.conv3d(x, m.w3).relu(), 2, 16, 5, 4, 6)
    yield _case(
        "stride and dilation", lambda m, x: F.conv2d(x, m.w2, m.b, (2, 1), (0, 2), (1, 2)).relu()
    )
    yield _case("batch", lambda m, x: F.conv2d(x, m.w2, m.b).relu(), dynamic_shapes=batch)
    yield _case("sizes", lambda m, x: F.conv2d(x, m.w2, m.b).relu(), dynamic_shapes=sizes)
    yield _case("same", lambda m, x: F.conv2d(x, m.w2, m.b, padding="same").relu())
    yield _case("valid", lambda m, x: F.conv2d(x, m.w2, m.b, padding="valid").relu())
    yield _case("no batch", lambda m, x: F.conv2d(x, m.w2, m.b).relu(), 16, 9, 8)
    yield _case("depthwise", lambda m, x: F.conv2d(x, m.each, groups=16).relu())
    yield _case("groups", lambda m, x: F.conv2d(x, m.pairs, m.b, groups=2).relu())
    yield _case("twice", lambda m, x: F.conv2d(x, m.w2).relu() + F.conv2d(x.tanh(), m.w2))
    yield _case("bfloat16", lambda m, x: F.conv2d(x, m.w2, m.b).relu(), kind=torch.bfloat16)
    yield _case("float16", lambda m, x: F.conv2d(x, m.w2, m.b).relu(), kind=torch.float16)
    yield _case("strided", lambda m, x: F.conv2d(x.mT, m.w2, m.b).relu())
    yield _case(
        "channels last", lambda m, x: F.conv2d(x.to(memory_format=torch.channels_last), m.w2).relu()
    )
    yield _case("written", lambda m, x: F.conv2d(x, m.w2, m.b).mul_(2.0).relu_())


def near_misses() -> Iterator[Example]:
    yield _case("head", lambda m, x: F.conv2d(x, m.w2)[:, 0], reason="output of the model")
    yield _case(
        "read elsewhere", lambda m, x: F.conv2d(x, m.w2).relu() + m.w2.sum(), reason="held twice"
    )
    yield _case("transposed", lambda m, x: F.conv_transpose2d(x, m.pairs[:16]).relu())
    yield _case("no weight", lambda _, x: F.conv2d(x, x[:, :, :3, :3]).relu())
    yield _case("wide", lambda m, x: F.conv2d(x, m.w2).relu(), kind=torch.float64, reason="float64")
    yield _case(
        "training", lambda m, x: F.conv2d(x, m.w2).relu(), training=True, reason="the model trains"
    )
