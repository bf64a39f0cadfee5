"""Losses on large logits that the benchmarks measure, and the same in float64 by chunks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 256
"""Rows whose logits are held at once in float64."""


class Head(nn.Module):
    """Cross entropy of a vocabulary. Hidden states are ``(N, D)``, targets ``(N,)``."""

    products = 3
    """Matrix products of ``2 N D V`` FLOPs that a step takes at least."""

    def __init__(self, width: int, classes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width, dtype=dtype) * width**-0.5)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, self.weight).float(), targets)

    def exact(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """The loss of float64 factors, differentiable, without ``N V`` numbers at once."""

        def part(h: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(h @ weight.T, t, reduction="sum")

        return torch.stack([*_in_chunks(part, hidden, targets)]).sum() / len(targets)


class Distilled(Head):
    """Jensen-Shannon divergence from a frozen teacher: the same head, classes turned round."""

    products = 4

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        with torch.no_grad():
            taught = F.linear(hidden.detach(), self.weight.detach().flip(0)).float()
        return _divergence(F.linear(hidden, self.weight).float(), taught) / len(hidden)

    def exact(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        teacher = weight.detach().flip(0)

        def part(h: Tensor) -> Tensor:
            return _divergence(h @ weight.T, h.detach() @ teacher.T)

        return torch.stack([*_in_chunks(part, hidden)]).sum() / len(hidden)


class Pairs(Head):
    """Symmetric InfoNCE (Radford et al. 2021) of ``N`` pairs; the columns wait for all rows."""

    products = 4

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        x = F.normalize(hidden, dim=-1) @ F.normalize(self.weight, dim=-1).T / 0.07
        own = torch.arange(x.shape[0], device=x.device)
        return (F.cross_entropy(x, own) + F.cross_entropy(x.T, own)) / 2

    def exact(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        f, g = F.normalize(hidden, dim=-1), F.normalize(weight, dim=-1) / 0.07

        def part(rows: Tensor) -> tuple[Tensor, Tensor]:
            x = rows @ g.T
            return x.logsumexp(1), x.logsumexp(0)

        rows, columns = zip(*_in_chunks(part, f), strict=True)
        both = torch.cat(rows).mean() + torch.stack(columns).logsumexp(0).mean()
        return both / 2 - (f * g).sum(1).mean()


class SigmoidPairs(Head):
    """Sigmoid loss of ``N`` pairs (Zhai et al. 2023), temperature 10 and bias -10."""

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        x = F.normalize(hidden, dim=-1) @ F.normalize(self.weight, dim=-1).T * 10 - 10
        signs = 2 * torch.eye(x.shape[0], device=x.device, dtype=x.dtype) - 1
        return -F.logsigmoid(signs * x).sum() / len(x)

    def exact(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        f, g = F.normalize(hidden, dim=-1), F.normalize(weight, dim=-1) * 10

        def part(rows: Tensor) -> Tensor:
            return F.softplus(rows @ g.T - 10).sum()

        own = (f * g).sum(1) - 10
        return (torch.stack([*_in_chunks(part, f)]).sum() - own.sum()) / len(f)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    mean = ((p.exp() + q.exp()) / 2).log()
    return (p.exp() * (p - mean) + q.exp() * (q - mean)).sum() / 2


def _in_chunks(part: Callable[..., Any], *rows: Tensor) -> Iterator[Any]:
    for chunk in zip(*(t.split(CHUNK) for t in rows), strict=True):
        yield checkpoint(part, *chunk, use_reentrant=False)


@torch.no_grad()
def peaked(head: Head, rows: int) -> tuple[Tensor, Tensor, float]:
    """Hidden states, targets and mean entropy (nats) of predictions as trained models make them.

    Logits of a class fall with the logarithm of its rank (Zipf), which is the class's own, and
    spread by 3 about that; targets are drawn from the predictions.
    """
    weight = head.weight
    classes, width = weight.shape
    rank = torch.randperm(classes, device=weight.device) + 1
    weight[:, 0] = (-rank.log() / log(classes)).to(weight.dtype)
    hidden = torch.randn(rows, width, device=weight.device) * 3
    hidden[:, 0] = log(classes)
    hidden = hidden.to(weight.dtype)
    drawn, entropies = [], []
    for chunk in hidden.split(CHUNK):
        logs = F.linear(chunk, weight).float().log_softmax(-1)
        drawn.append(logs.exp().multinomial(1).squeeze(1))
        entropies.append(-(logs.exp() * logs).sum(1))
    return hidden, torch.cat(drawn), float(torch.cat(entropies).mean())
