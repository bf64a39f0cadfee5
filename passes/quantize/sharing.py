"""Who reads a weight: all of them must be content with it in few bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt.rewrite import Match, Refusal, arguments

aten = torch.ops.aten

HEAD, EMBEDDINGS = "head=True", "embeddings=True"

_PLAIN = frozenset(
    {"_to_copy", "clone", "reshape", "view", "slice", "select", "alias", "unsqueeze", "permute"}
)
"""Operators that show numbers without computing others."""


def refusal(match: Match, *, head: bool) -> Refusal | None:
    """Why the calls of a match cannot be rewritten on their ``weight``, and what would allow it."""
    reasons, options = [], []
    shown = None if head else shown_product(match.nodes)
    if shown is not None:
        reasons.append(f"`{shown.name}` is an output of the model: errors of a head are its own")
        options.append(HEAD)
    other = other_reader(match)
    if other is not None:
        reasons.append(f"`{other.name}` reads the weight too: quantized it would be held twice")
        is_lookup = other.target is aten.embedding.default
        options = [*options, EMBEDDINGS] if is_lookup else []
    if not reasons:
        return None
    option = f"QuantizeMatmul:{','.join(options)}" if options else None
    return Refusal("; ".join(reasons), other if other is not None else shown, option)


def other_reader(match: Match) -> fx.Node | None:
    """A reader of the weight that is no call of the match, or a call that reads it otherwise.

    Of several, one that no option takes along.
    """
    weight = match["weight"]
    others = [u for u in weight.users if u not in match.nodes or not _only_weight(u, weight)]
    others.sort(key=lambda u: u.target is aten.embedding.default)
    return next(iter(others), None)


def _only_weight(node: fx.Node, weight: fx.Node) -> bool:
    return all(value is not weight for k, value in arguments(node).items() if k != "weight")


def shown_product(nodes: Sequence[fx.Node]) -> fx.Node | None:
    """A product that the caller gets as it is, or as views of it; look-ups are no products."""
    products = [n for n in nodes if n.target is not aten.embedding.default]
    queue, seen = [*products], set(products)
    while queue:
        node = queue.pop()
        for user in node.users:
            if user.op == "output":
                return node
            name = getattr(user.target, "_opname", "")
            if user not in seen and name in _PLAIN:
                seen.add(user)
                queue.append(user)
    return None
