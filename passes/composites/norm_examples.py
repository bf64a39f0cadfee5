"""Spellings of RMSNorm and LayerNorm, and look-alikes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graphopt.passes.composites.examples import case, half
from graphopt.rewrite import Example

EPS = 1e-5


def _mean_square(x: Tensor, dim: int = -1) -> Tensor:
    return x.pow(2).mean(dim, keepdim=True)


def llama(x: Tensor, weight: Tensor) -> Tensor:
    floats = x.to(torch.float32)
    normed = floats * torch.rsqrt(_mean_square(floats) + EPS)
    return weight.to(x.dtype) * normed.to(x.dtype)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    floats = x.float()
    normed = floats * torch.rsqrt(_mean_square(floats) + EPS)
    return (normed * (1.0 + weight.float())).type_as(x)


def _plain(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(_mean_square(x) + EPS))


def _divided(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + EPS) * weight


def _two_axes(x: Tensor) -> Tensor:
    return x * (x.square().mean((-2, -1), keepdim=True) + EPS).rsqrt()


def _root_used(x: Tensor) -> tuple[Tensor, Tensor]:
    root = torch.rsqrt(_mean_square(x) + EPS)
    return x * root, root


def _another(x: Tensor, y: Tensor) -> Tensor:
    return y * torch.rsqrt(_mean_square(x) + EPS)


def rms_examples() -> Iterator[Example]:
    yield case("power", _plain)
    yield case("training", _plain, training=True)
    yield case("divided", _divided)
    yield case("divided, training", _divided, training=True)
    yield case("reciprocal", lambda x: x * (1 / torch.sqrt(_mean_square(x) + EPS)))
    yield case("power of a half", lambda x: x * (_mean_square(x) + EPS) ** -0.5)
    yield case("no epsilon", lambda x: x * _mean_square(x).rsqrt())
    yield case("two axes", _two_axes)
    yield case("float32 inside", llama, half(2, 5, 8))
    yield case("weight in float32", gemma, half(2, 5, 8))
    yield case("offset weight", gemma)
    yield case("offset weight, training", gemma, training=True)
    yield case("weight of another shape", lambda x, y: _two_axes(x) * y, (2, 5, 8), (8,))


def rms_near_misses() -> Iterator[Example]:
    yield case(
        "eps outside",
        lambda x: x / (x.norm(2, -1, keepdim=True) * 8**-0.5 + EPS),
        reason="outside the root",
    )
    yield case("another tensor", _another, *((2, 5, 8),) * 2, reason="another tensor")
    yield case("root returned", _root_used, reason="also an output")
    yield case(
        "other axis",
        lambda x: x * torch.rsqrt(_mean_square(x, 1) + EPS),
        reason="norms run over the last",
    )
    yield case(
        "half without upcast",
        lambda x: x * torch.rsqrt(_mean_square(x) + EPS),
        half(2, 5, 8),
        reason="slower on CPU",
    )
    yield case("cubes", lambda x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + EPS))


def var_spelling(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(var + EPS) * weight + bias


def squares_spelling(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return bias + weight * (centred * torch.rsqrt(_mean_square(centred) + EPS))


def bert_spelling(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The deviation computed twice."""
    mean = x.mean(-1, keepdim=True)
    var = (x - mean).pow(2).mean(-1, keepdim=True)
    return weight * ((x - mean) / torch.sqrt(var + 1e-12)) + bias


def _var_mean(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + EPS)


def _upcast(x: Tensor, weight: Tensor) -> Tensor:
    floats = x.float()
    centred = floats - floats.mean(-1, keepdim=True)
    return (centred * torch.rsqrt(_mean_square(centred) + EPS)).to(x.dtype) * weight.to(x.dtype)


def _centred_used(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(_mean_square(centred) + EPS) + centred


def _unbiased(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + EPS)


def _deviation(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS)


def _other_mean(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + EPS)


def layer_examples() -> Iterator[Example]:
    yield case("variance", var_spelling)
    yield case("variance, training", var_spelling, training=True)
    yield case("squares", squares_spelling)
    yield case("squares, training", squares_spelling, training=True)
    yield case("twice", bert_spelling)
    yield case("both moments", _var_mean)
    yield case("float32 inside", _upcast, half(2, 5, 8))
    yield case(
        "scale without shift", lambda x, weight: squares_spelling(x, weight, torch.zeros(8)).sin()
    )


def layer_near_misses() -> Iterator[Example]:
    yield case("unbiased", _unbiased, reason="unbiased")
    yield case("eps outside", _deviation, reason="outside the root")
    yield case("other mean", _other_mean, reason="not the deviation")
    yield case("deviation used", _centred_used, reason="also used by")
    yield case(
        "channels first",
        lambda x: (
            (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, correction=0, keepdim=True) + EPS)
        ),
        reason="norms run over the last",
    )
