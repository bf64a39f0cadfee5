"""Row selections that move before their product, and look-alikes that must not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.passes.loss_head.heads import CLASSES, DYNAMIC, HEADS, Head, case, masked_divergence
from graphopt.rewrite import Example

_ALL = ("masked", "answers", "found", "sampled", "masked teacher", "positions")
NAMES = tuple(name for name in _ALL if name in HEADS)


def examples() -> Iterator[Example]:
    for name in NAMES:
        yield case(name, HEADS[name], training=True)
        yield case(f"{name}, dynamic", HEADS[name], training=True, dynamic_shapes=DYNAMIC)
    yield case("in eval mode", HEADS["masked"])
    yield case("all rows besides", HEADS["masked, accuracy"], training=True)
    yield case("two masks", _two_masks, training=True, count=2)
    yield case("rows of rows", lambda m, h, t: m.logits(h)[:, 3][t[:, 0] > 9].amax(-1).sum())
    yield case("last", _last, training=True)
    yield case("columns of rows", lambda m, h, _: m.logits(h)[:, _SOME].amax(-1).sum())
    yield case("turned", lambda m, h, t: m.logits(h).mT.mT[t > 9].amax(-1).sum())
    yield case("batch behind", lambda m, h, t: m.logits(h).transpose(0, 1)[t.T > 9].amax(-1).sum())
    yield case("many", _many, training=True)
    yield case("beside others", _beside, training=True)
    yield case("normalised", _normalised, training=True)
    yield case("divergence", masked_divergence, training=True)
    yield case("none", lambda m, h, t: m.logits(h)[t > CLASSES].amax(-1).sum(), training=True)


_SOME = torch.tensor([1, 1, 60])


def _two_masks(m: Head, h: Tensor, t: Tensor) -> Tensor:
    x = m.logits(h)
    return x[t > 100].amax(-1).sum() + x[t < 50].amax(-1).mean()


def _last(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """The last token that is not padding."""
    return m.logits(h)[torch.arange(h.shape[0]), (t > 9).sum(-1) - 1].amax(-1).mean()


def _many(m: Head, h: Tensor, t: Tensor) -> Tensor:
    rows = torch.cat([t.flatten(), t.flatten()]) % 60
    return m.logits(h).flatten(0, 1)[rows].amax(-1).mean()


def _beside(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """Tensors with the same rows, and with none, that meet the logits."""
    x = m.logits(h) * h[..., :1].detach() + m.b - m.weights[None, None]
    return x[t > 100].amax(-1).sum()


def _normalised(m: Head, h: Tensor, t: Tensor) -> Tensor:
    x = m.logits(h)
    return (x - x.logsumexp(-1, keepdim=True))[t > 100].amax(-1).sum()


def near_misses() -> Iterator[Example]:
    yield case("returned", _returned, training=True, reason="output of the model")
    yield case("classes", lambda m, h, _: m.logits(h)[..., m.weights > 1].amax(-1))
    yield case("all", lambda m, h, t: m.logits(h)[0, t[0] % 65, t[0]].sum())
    yield case("turned", lambda m, h, t: m.logits(h).mT[:, :, t[0] > 9].amax(1))
    yield case("sorted too", _sorted_too, training=True, reason="aten.sort mixes rows")
    yield case("written", _written, training=True)
    yield case("a mean of all besides", _beside_a_mean, training=True)
    yield case("inner", lambda m, h, t: m.logits(h)[t > 9].relu() @ m.w, training=True)
    yield case("some axes", _some_axes, training=True, reason="some of the row axes")


def _returned(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x = m.logits(h)
    return x[t > 100].amax(-1).sum(), x


def _sorted_too(m: Head, h: Tensor, t: Tensor) -> Tensor:
    x = m.logits(h)
    return x[t > 100].amax(-1).sum() + x.sort(1)[0].sum(-1).mean()


def _beside_a_mean(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """What is selected holds a number that all rows make."""
    x = m.logits(h)
    return (x.sigmoid() + F.mse_loss(x, torch.ones_like(x)))[t > 100].amax(-1).sum()


def _written(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """Rows are written before they are read."""
    x = m.logits(h).clone()
    x[t > 100] = 0.0
    return x[t > 50].amax(-1).sum()


def _some_axes(m: Head, h: Tensor, t: Tensor) -> Tensor:
    x = m.logits(h) * h[:, :1, :1]
    return x[t > 100].amax(-1).sum()
