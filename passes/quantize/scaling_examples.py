"""Channels whose factors can be moved, and look-alikes whose cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.rewrite import Example

WIDTH = 8


class Model(nn.Module):
    """Two products, and a function of the module and an input."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.small = nn.Linear(WIDTH, WIDTH // 2)
        self.three = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.vector = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _grouped(m: Any, x: Tensor) -> Tensor:
    """Attention whose heads share keys and values in pairs."""
    split = lambda t, heads: t.view(*t.shape[:2], heads, 2).transpose(1, 2)  # noqa: E731
    q, v = split(x, 4), split(m.small(x), 2)
    v = v[:, :, None].expand(-1, -1, 2, -1, -1).reshape(v.shape[0], 4, -1, 2)
    made = F.scaled_dot_product_attention(q, q, v)
    return m.two(made.transpose(1, 2).reshape(x.shape))


def _merged(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.three(x).chunk(3, -1)
    return m.two(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


def _case(name: str, function: Callable[[Any, Tensor], Any], **options: Any) -> Example:
    return Example(name, lambda: Model(function), lambda: (torch.randn(2, 5, WIDTH),), **options)


def examples() -> Iterator[Example]:
    axes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    yield _case("relu", lambda m, x: m.two(m.one(x).relu()))
    yield _case("dynamic", lambda m, x: m.two(m.one(x).relu()), dynamic_shapes=axes)
    yield _case("norm", lambda m, x: m.one(m.norm(x)) + m.two(m.norm(x)), count=2)
    yield _case("rms", lambda m, x: m.one(m.rms(x)))
    yield _case("vector", lambda m, x: m.one(x.sin() * m.vector))
    yield _case("gated", lambda m, x: m.two(F.silu(x) * m.one(x)))
    yield _case("grouped", _grouped)
    yield _case("grouped, dynamic", _grouped, dynamic_shapes=axes)
    yield _case("merged", _merged)
    yield _case(
        "two readers", lambda m, x: m.two((y := m.one(x)).relu()) + m.small(y).repeat(1, 1, 2)
    )
    yield _case("a part is returned", lambda m, x: ((y := m.one(x))[..., :3], m.two(y)))


def near_misses() -> Iterator[Example]:
    yield _case("curved", lambda m, x: m.two(F.gelu(m.one(x))))
    yield _case("residual", lambda m, x: m.two(x + m.one(x)))
    yield _case("returned", lambda m, x: (m.two(y := m.one(x)), y), reason="output of the model")
    yield _case("trains", lambda m, x: m.two(m.one(x).relu()), training=True)
    yield _case(
        "tied", lambda m, x: m.two(m.one(x).relu()) + m.two(x), reason="the weight is also read by"
    )
    yield _case(
        "the producer's weight is tied",
        lambda m, x: m.two(m.one(x).relu()) + m.one(x.sin()).tanh(),
        reason="the weight is also read by",
    )
    yield _case("reshaped", lambda m, x: m.two(m.one(x).transpose(0, 2).reshape(x.shape)))
