"""Who reads a weight: all of them must be content with it in few bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt.passes.quantize.names import Scope
from graphopt.rewrite import Match, Refusal, arguments

aten = torch.ops.aten

HEAD, EMBEDDINGS = "head=True", "embeddings=True"

_PLAIN = frozenset(
    {"_to_copy", "clone", "reshape", "view", "slice", "select", "alias", "unsqueeze", "permute"}
)
"""Operators that show numbers without computing others."""


def out_of_scope(match: Match, scope: Scope) -> Refusal | None:
    """Why the ``weight`` of a match is left alone: it is skipped, or a head."""
    skipped = scope.skip.refusal(match.program, match["weight"])
    return skipped or _head_refusal(match, scope)


def _head_refusal(match: Match, scope: Scope) -> Refusal | None:
    shown = None if scope.head else shown_product(match.nodes)
    if shown is None:
        return None
    reason = f"`{shown.name}` is an output of the model: errors of a head are its own"
    return Refusal(reason, shown, f"QuantizeMatmul:{HEAD}")


def refusal(match: Match, scope: Scope) -> Refusal | None:
    """Why the calls of a match cannot be rewritten on their ``weight``, and what would allow it."""
    if (skipped := scope.skip.refusal(match.program, match["weight"])) is not None:
        return skipped
    head, other = _head_refusal(match, scope), other_reader(match)
    if other is None:
        return head
    reason = f"`{other.name}` reads the weight too: quantized it would be held twice"
    reason = f"{head.reason}; {reason}" if head else reason
    if other.target is not aten.embedding.default:
        return Refusal(reason, other)
    option = f"{head.option},{EMBEDDINGS}" if head else f"QuantizeMatmul:{EMBEDDINGS}"
    return Refusal(reason, other, option)


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
