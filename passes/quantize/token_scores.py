"""How important the tokens of a sample are, and which token each row holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphopt.analysis.axes import AxisFlow, bind_sizes, index_map
from graphopt.analysis.axis_rules.sizes import size_of
from graphopt.calibration import Stream
from graphopt.program import Program, val
from graphopt.rewrite import arguments

LEAST = 0.01
"""What the least important row of a sample counts, the most important being 1: r_min."""
SHARE = 4
"""One of so many tokens is among the first."""
QUERIES = 256
"""Rows of an attention matrix that are held at a time."""


def scaled(scores: Tensor) -> Tensor:
    """Scores of the rows of a sample as r, between `LEAST` and 1; 1 where all are the same."""
    if not scores.numel():
        return scores
    low, high = scores.amin(), scores.amax()
    if not high > low:
        return torch.ones_like(scores)
    return LEAST + (1 - LEAST) * (scores - low) / (high - low)


def received(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """What each key gets of attention, summed over queries ``(..., L, E)``.

    Returns:
        ``(..., S)``, float32, with the heads of the queries; a row that sees nothing gives nothing.
    """
    query, key = query.float(), key.float()
    if key.dim() > 2 and key.shape[-3] not in (1, query.shape[-3]):
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)  # grouped heads
    places = torch.arange(key.shape[-2], device=key.device)
    total: Tensor | float = 0.0
    for start in range(0, query.shape[-2], QUERIES):
        part = query[..., start : start + QUERIES, :]
        logits = part @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            rows = attn_mask.shape[-2] > 1
            mask = attn_mask[..., start : start + QUERIES, :] if rows else attn_mask
            bias = mask.to(logits.dtype)
            logits = (
                logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + bias
            )
        if is_causal:
            last = torch.arange(start, start + part.shape[-2], device=key.device)[:, None]
            logits = logits.masked_fill(places > last, -torch.inf)
        total = total + logits.softmax(-1).nan_to_num(0.0).sum(-2)
    assert isinstance(total, Tensor)  # there is a query
    return total


def by_token(
    attention: fx.Node, flow: AxisFlow, given: Mapping[str, Any], sizes: Mapping[sympy.Symbol, int]
) -> Tensor:
    """What each token of a sample gets of an attention."""
    key = given["key"]
    gets = received(given["query"], key, given["attn_mask"], given["is_causal"], given["scale"])
    tokens = tokens_of(flow, arguments(attention)["key"], sizes, key.dim())
    tokens = tokens.to(gets.device).expand(gets.shape).flatten()
    count = _number(flow.extent, sizes)
    known = (tokens >= 0) & (tokens < count)
    return gets.new_zeros(count).index_add(0, tokens[known], gets.flatten()[known])


def first_tokens(
    attention: fx.Node, flow: AxisFlow, sizes: Mapping[sympy.Symbol, int], first: int | None
) -> Tensor:
    """1 for the first tokens of each sequence of a sample, 0 for others."""
    key = arguments(attention)["key"]
    shape = [_number(extent, sizes) for extent in val(key).shape[:-1]]
    tokens = tokens_of(flow, key, sizes, val(key).dim()).expand(shape)
    places = torch.arange(shape[-1]).expand(shape)
    count = _number(flow.extent, sizes)
    known = (tokens >= 0) & (tokens < count)
    found = torch.zeros(count).index_put((tokens[known],), places[known].float())
    return (found < (first or max(shape[-1] // SHARE, 1))).float()


def rarities(program: Program, samples: Sequence[Sequence[Any]], indices: fx.Node) -> list[Tensor]:
    """How often each id of a sample is there in all of them, negative."""
    stream = Stream(program, samples, [indices])
    stream.advance_to(len(stream.nodes))
    given = [ids.flatten() for ids in stream.given(indices)]
    known, counts = torch.cat(given).unique(return_counts=True)
    return [-counts[torch.searchsorted(known, ids)].float() for ids in given]


def tokens_of(
    flow: AxisFlow, node: fx.Node, sizes: Mapping[sympy.Symbol, int], rank: int
) -> Tensor:
    """The token that each position of a tensor holds, without its last dim."""
    return index_map(flow.places(node)[0].at(sizes), rank)[..., 0]


def _number(extent: Any, sizes: Mapping[sympy.Symbol, int]) -> int:
    return int(sympy.sympify(size_of(extent)).subs(sizes))


def sizes_of(program: Program, sample: Sequence[Any]) -> dict[sympy.Symbol, int]:
    """What symbols of sizes stand for."""
    found: dict[sympy.Symbol, int] = {}
    for node, value in zip(program.user_inputs(), sample, strict=True):
        fake = val(node)
        if isinstance(fake, Tensor) and isinstance(value, Tensor):
            found |= bind_sizes(fake, value)
    return found
