"""Heads of several codebooks or classifiers on one product: ``V`` classes in each of G groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

GROUPS = 4

Function = Callable[..., Any]


def split(x: Tensor) -> Tensor:
    """``(B, T, G, V)``."""
    return x.view(*x.shape[:-1], GROUPS, x.shape[-1] // GROUPS)


def labels(m: Any, t: Tensor) -> Tensor:
    """``(B, T, G)``, others in each group."""
    return (t.unsqueeze(-1) + torch.arange(GROUPS) * 7) % (m.w.shape[0] // GROUPS)


def loss(x: Tensor, t: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(x.reshape(-1, x.shape[-1]), t.reshape(-1), **options)


def of_rows(m: Any, h: Tensor, t: Tensor) -> Tensor:
    return loss(split(m.logits(h)), labels(m, t))


def groups_first(m: Any, h: Tensor, t: Tensor) -> Tensor:
    """Copet et al. 2023: ``(B, G, T, V)``."""
    return loss(split(m.logits(h)).transpose(1, 2), labels(m, t).transpose(1, 2))


def classes_second(m: Any, h: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(split(m.logits(h)).permute(0, 3, 1, 2), labels(m, t))


def one_by_one(m: Any, h: Tensor, t: Tensor) -> Tensor:
    """Gloeckle et al. 2024: a loss for each."""
    x, y = m.logits(h).unflatten(-1, (GROUPS, -1)), labels(m, t)
    return sum((loss(x[:, :, k], y[:, :, k]) for k in range(GROUPS)), torch.zeros(()))


def in_parts(m: Any, h: Tensor, t: Tensor) -> Tensor:
    parts, y = m.logits(h).chunk(GROUPS, -1), labels(m, t)
    return sum((loss(x, y[..., k]) for k, x in enumerate(parts)), torch.zeros(()))


def at_once(m: Any, h: Tensor, t: Tensor) -> Tensor:
    """Flat from the product on, with a bias, upcast and capped in front."""
    x = F.linear(h, m.w, m.b).float() / 30
    return loss((30 * torch.tanh(x)).view(-1, m.w.shape[0] // GROUPS), labels(m, t))


def einsum(m: Any, h: Tensor, t: Tensor) -> Tensor:
    weight = m.w.view(GROUPS, -1, m.w.shape[1])
    return loss(torch.einsum("btd,kvd->btkv", h, weight), labels(m, t))


def einsum_turned(m: Any, h: Tensor, t: Tensor) -> Tensor:
    weight = m.w.view(GROUPS, m.w.shape[1], -1)
    return loss(torch.einsum("btd,kdv->bktv", h, weight), labels(m, t).transpose(1, 2))


def with_options(m: Any, h: Tensor, t: Tensor) -> Tensor:
    x, y = split(m.logits(h)), labels(m, t)
    weight = m.weights[: x.shape[-1]]
    return loss(x, y, weight=weight, label_smoothing=0.1) + loss(x, y, ignore_index=3)


def with_accuracy(m: Any, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x, y = split(m.logits(h)), labels(m, t)
    return loss(x, y), (x.argmax(-1) == y).float().mean((0, 1))


def picked(m: Any, h: Tensor, t: Tensor) -> Tensor:
    """Log-probabilities of the sampled entry of each codebook, summed up."""
    logs = split(m.logits(h)).log_softmax(-1)
    each = logs.gather(-1, labels(m, t).unsqueeze(-1)).squeeze(-1).sum(-1)
    return -(each * h[..., 0].detach()).mean()


def weighted(m: Any, h: Tensor, t: Tensor) -> Tensor:
    """Groups count differently, and some positions of each do not."""
    each = F.cross_entropy(split(m.logits(h)).permute(0, 3, 1, 2), labels(m, t), reduction="none")
    keep = (labels(m, t) > 9) * torch.linspace(0.5, 1.5, GROUPS)
    return (each * keep).sum() / keep.sum()


def shifted(m: Any, h: Tensor, t: Tensor) -> Tensor:
    x = m.logits(h)[:, :-1].float().contiguous()
    return loss(x.reshape(-1, x.shape[-1] // GROUPS), labels(m, t)[:, 1:])


def ahead(m: Any, h: Tensor, t: Tensor) -> Tensor:
    """Each group predicts one token further ahead."""
    x, y = split(m.logits(h)), t % (m.w.shape[0] // GROUPS)
    each = (loss(x[:, : -k - 1, k], y[:, k + 1 :]) for k in range(GROUPS))
    return sum(each, torch.zeros(())) / GROUPS


def of_some(m: Any, h: Tensor, t: Tensor) -> Tensor:
    return loss(split(m.logits(h))[:, :, 1:3], labels(m, t)[:, :, 1:3])


def with_prior(m: Any, h: Tensor, t: Tensor) -> Tensor:
    """Numbers for each class of each group, and a temperature for each group."""
    heat = 1 + m.b[:GROUPS].square().unsqueeze(-1)
    return loss(split(m.logits(h)) / heat + m.b.view(GROUPS, -1), labels(m, t))


def distilled(m: Any, h: Tensor, _: Tensor) -> Tensor:
    student, teacher = split(m.logits(h)), split(m.taught(h))
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum") / h.shape[1]


HEADS: dict[str, Function] = {
    "groups": of_rows,
    "groups first": groups_first,
    "groups, classes second": classes_second,
    "groups one by one": one_by_one,
    "groups in parts": in_parts,
    "groups at once": at_once,
    "groups, einsum": einsum,
    "groups, einsum turned": einsum_turned,
    "groups, options": with_options,
    "groups, accuracy": with_accuracy,
    "groups picked": picked,
    "groups weighted": weighted,
    "groups shifted": shifted,
    "groups ahead": ahead,
    "groups distilled": distilled,
    "groups, some": of_some,
    "groups, prior": with_prior,
}
UNSPLIT = frozenset({"groups in parts", "groups, einsum", "groups, einsum turned"})
"""Heads whose product is not split by a view."""


def over_groups(m: Any, h: Tensor, _: Tensor) -> Tensor:
    return split(m.logits(h)).logsumexp(-2).mean()


def groups_last(m: Any, h: Tensor, t: Tensor) -> Tensor:
    x = m.logits(h).unflatten(-1, (-1, GROUPS))
    return loss(x.transpose(-1, -2), labels(m, t))


def mixed(m: Any, h: Tensor, t: Tensor) -> Tensor:
    x = split(m.logits(h))
    return loss(x - x.mean(-2, keepdim=True), labels(m, t))


def of_both(m: Any, h: Tensor, t: Tensor) -> Tensor:
    """All classes are read besides, as one."""
    x = m.logits(h)
    return loss(split(x), labels(m, t)) + x.logsumexp(-1).mean()


def returned(m: Any, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x = split(m.logits(h))
    return loss(x, labels(m, t)), x


MISSES: list[tuple[str, Function, str]] = [
    ("over groups", over_groups, "mixes rows"),
    ("groups last", groups_last, "share an axis"),
    ("across groups", mixed, "some of the rows"),
    ("groups and all", of_both, "repeats or cuts"),
    ("groups returned", returned, "output of the model"),
]
