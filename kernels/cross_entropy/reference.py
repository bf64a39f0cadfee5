"""The definition, in plain PyTorch: a chunk of rows at a time, on any device.

Logits are products in float32 (float64 for float64) of the operands as they are; a narrow weight
is widened once for the whole call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from graphopt.kernels.cross_entropy.operands import (
    Cotangents,
    Head,
    Summaries,
    counted,
    wide,
)

CHUNK_BYTES = 12 * 2**20
"""Of the logits of one chunk: the few matrices of this size in use stay in cache."""


def forward(head: Head, sums: bool, entropy: bool, argmax: bool) -> Summaries:
    """All summaries of every row; those not asked for are empty."""
    asked = (True, True, sums, entropy, argmax)
    found = [summaries(logits(part), part) for _, part in chunks(head)]
    whole = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    return Summaries(*(t if a else t.new_empty(0) for t, a in zip(whole, asked, strict=True)))


def logits(head: Head) -> Tensor:
    """``z = c tanh(x / c)`` of ``x = hidden weight^T + bias``, ``(N, V)``."""
    kind = wide(head.hidden.dtype)
    made = head.hidden.to(kind) @ head.weight.to(kind).mT
    made = made if head.bias is None else made + head.bias.to(kind)
    return made if head.softcap is None else head.softcap * torch.tanh(made / head.softcap)


def summaries(z: Tensor, head: Head) -> Summaries:
    """Of logits ``z (N, V)``: differentiable, any number of times."""
    lse = z.logsumexp(1)
    own = z.gather(1, _safe(head)[:, None]).squeeze(1).where(counted(head), 0.0)
    log_p = (z - lse[:, None]).where(z > -torch.inf, 0.0)
    entropy = -(torch.softmax(z, 1) * log_p).sum(1)
    return Summaries(lse, own, z.sum(1), entropy, z.argmax(1))


def backward(
    head: Head,
    lse: Tensor,
    entropy: Tensor,
    cotangents: Cotangents,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of hidden, weight and bias, those that are wanted.

    Args:
        lse, entropy: of the forward pass; entropy only if it has a cotangent.
    """
    kind = wide(head.hidden.dtype)
    bias = head.weight.new_empty(head.weight.shape[0]) if head.bias is None else head.bias
    into = [
        torch.zeros(t.shape, dtype=kind, device=t.device) if w else None
        for t, w in zip((head.hidden, head.weight, bias), wanted, strict=True)
    ]
    for span, part in chunks(head):
        z = logits(part)
        given = Cotangents(*(c if c is None else c[span] for c in cotangents))
        slope = slopes(z, part, lse[span], entropy[span], given)
        _take(into, slope, span, part)
    kinds = (head.hidden.dtype, head.weight.dtype, bias.dtype)
    return [g.to(k) for g, k in zip(into, kinds, strict=True) if g is not None]


def slopes(z: Tensor, head: Head, lse: Tensor, entropy: Tensor, given: Cotangents) -> Tensor:
    """Derivative with respect to the product, through the soft-cap, ``(N, V)``.

    Of the log-sum-exp it is ``p = exp(z - lse)``, of the entropy ``H`` it is ``-p (log p + H)``.
    """
    log_p = z - lse[:, None]
    p = log_p.exp()
    slope = torch.zeros_like(z)
    if given.lse is not None:
        slope += given.lse[:, None] * p
    if given.entropy is not None:
        slope -= given.entropy[:, None] * p * (log_p + entropy[:, None]).where(p > 0, 0.0)
    if given.logit_sum is not None:
        slope += given.logit_sum[:, None]
    if given.target_logit is not None:
        own = given.target_logit.where(counted(head), 0.0).to(z.dtype)
        slope.scatter_add_(1, _safe(head)[:, None], own[:, None])
    return slope if head.softcap is None else slope * (1 - (z / head.softcap) ** 2)


def chunks(head: Head) -> Iterator[tuple[slice, Head]]:
    """Spans of rows, with the head cut down to them; one of no rows where there are none."""
    kind = wide(head.hidden.dtype)
    weight = head.weight.to(kind)
    step = max(1, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
    for start in range(0, max(1, head.hidden.shape[0]), step):
        span = slice(start, start + step)
        cut = head._replace(hidden=head.hidden[span].to(kind), target=head.target[span])
        yield span, cut._replace(weight=weight)


def _take(into: Sequence[Tensor | None], slope: Tensor, span: slice, part: Head) -> None:
    hidden, weight, bias = into
    if hidden is not None:
        hidden[span] = slope @ part.weight
    if weight is not None:
        weight.addmm_(slope.mT, part.hidden)
    if bias is not None:
        bias += slope.sum(0)


def _safe(head: Head) -> Tensor:
    """Targets, or class 0 where there is none."""
    return head.target.where(counted(head), 0).long()
