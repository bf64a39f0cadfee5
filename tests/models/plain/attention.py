"""Scaled dot-product attention written out by hand: spellings that are equal, and near misses.

Each function maps ``q, k, v`` of ``(B, H, S, D)`` to ``(B, H, S, D)``. ``SPELLINGS`` all compute
``softmax(q k^T / sqrt(D)) v`` with or without a causal mask; ``NEAR_MISSES`` look alike but do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def divided(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1) @ v


def multiplied(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.mT) * q.size(-1) ** -0.5
    return scores.softmax(-1).matmul(v)


def query_scaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return nn.functional.softmax((q * q.size(-1) ** -0.5) @ k.transpose(2, 3), dim=3) @ v


def both_scaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    root = q.size(-1) ** -0.25
    return torch.softmax((q * root) @ (k * root).transpose(-1, -2), -1) @ v


def einsummed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def batched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    shape = q.shape
    q, k, v = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
    empty = torch.empty((), dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), v).view(shape)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax itself written out."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def in_float(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def permuted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """From the layout ``(B, S, H, D)``, the transpose and the swap of axes in one permute."""
    keys = k.permute(0, 2, 1, 3)
    return torch.softmax(q @ keys.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5, -1) @ v


def added_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    bias = torch.full(scores.shape[-2:], float("-inf"), device=q.device).triu(1)
    return torch.softmax(bias + scores, dim=-1) @ v


def filled_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def chosen_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    lowest = torch.finfo(scores.dtype).min
    return torch.where(seen, scores, torch.tensor(lowest)).softmax(-1) @ v


def key_untransposed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Keys permuted as if from ``(B, S, H, D)`` though they are not: legal when H equals S."""
    return torch.softmax(q @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5, -1) @ v


def scaled_after(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (torch.softmax(q @ k.transpose(-2, -1), -1) / math.sqrt(q.shape[-1])) @ v


def masked_after(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1)
    return weights.tril() @ v


def masked_before_scale(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A finite mask that is scaled along with the scores."""
    bias = torch.linspace(-1, 0, k.shape[-2], device=q.device)
    return torch.softmax((q @ k.transpose(-2, -1) + bias) / math.sqrt(q.shape[-1]), -1) @ v


def over_queries(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-2) @ v


def dropped_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1)
    return nn.functional.dropout(weights, 0.5, training=True) @ v


def wrong_size(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The scale is of the sequence, not the head: another constant, and one that varies."""
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-2]), -1) @ v


SPELLINGS: tuple[Attend, ...] = (
    divided,
    multiplied,
    query_scaled,
    both_scaled,
    einsummed,
    batched,
    by_hand,
    in_float,
    permuted,
    added_mask,
    filled_mask,
    chosen_mask,
)
CAUSAL: frozenset[Attend] = frozenset({added_mask, filled_mask, chosen_mask})
NEAR_MISSES: tuple[Attend, ...] = (
    scaled_after,
    masked_after,
    masked_before_scale,
    over_queries,
    dropped_out,
    wrong_size,
)
# Their graph holds a number computed from the length.
FIXED_LENGTH: frozenset[Attend] = frozenset({masked_before_scale, wrong_size})


class HandAttention(nn.Module):
    """Projections around one of the functions above; ``(B, S, 16)`` to the same, 4 heads of 4."""

    def __init__(self, attend: Attend, heads: int = 4, width: int = 16) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (f(x).view(split).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))


class FusedGrouped(nn.Module):
    """One projection for q, k, v; two key heads serve four query heads; weights are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 16 + 2 * 8), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, seq, _ = x.shape
        q, k, v = self.qkv(x).split((16, 8, 8), dim=-1)
        q = q.view(batch, seq, 4, 4).transpose(1, 2)
        k, v = (t.view(batch, seq, 2, 4).transpose(1, 2).repeat_interleave(2, 1) for t in (k, v))
        weights = torch.softmax(q @ k.transpose(-2, -1) * 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights
