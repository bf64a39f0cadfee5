"""Who needs a large product whole, and whether a product is a head at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from graphopt.kernels.chunked_rows import allowed
from graphopt.passes.loss_head import lazy
from graphopt.passes.loss_head.handlers import summarises
from graphopt.passes.loss_head.products import PRODUCTS, LargeProduct
from graphopt.passes.loss_head.translate import Translation
from graphopt.program import val
from graphopt.rewrite import Refusal

OPTIONS = (
    "FuseLossHead:lazy_logits=True or FuseLossHead:drop_logits=True",
    "FuseLossHead:drop_logits=True",
)
"""What allows logits among the outputs, before and after lazy ones were tried."""


def is_large(found: Translation, node: fx.Node) -> bool:
    """Whether a value inside cannot be a result: a matrix, or several values as one."""
    return found.is_matrix(node) or not isinstance(val(node), torch.Tensor)


def is_head(head: LargeProduct) -> bool:
    """Whether the classes end in summaries, and in no further product: no inner layer is a head."""
    ends, seen, queue = False, {head.node}, [head.node]
    while queue:
        for user in queue.pop().users:
            if user.target in PRODUCTS:
                return False
            if summarises(user):
                ends = True
            elif user not in seen and user.op == "call_function":
                seen.add(user)
                queue.append(user)
    return ends


def needed_whole(
    translations: Sequence[Translation],
    later: Mapping[fx.Node, Translation] | None = None,
    *,
    outputs: bool = True,
    apart: Collection[fx.Node] = (),
) -> Refusal | None:
    """A matrix that is read outside, and why its reader is not inside.

    Args:
        later: matrices that can be computed when the output is read; ``None`` where none may be.
        outputs: whether the model's output counts as a reader.
        apart: readers that will read something else.
    """
    inside = {n for t in translations for n in t.inside}
    for node in {n: None for t in translations for n in t.values if is_large(t, n)}:
        for user in node.users:
            if user in apart or (later and node in later and lazy.shows(user, later[node])):
                continue
            if user.op == "output":
                if outputs:
                    reason = f"`{node.name}` is an output of the model"
                    return Refusal(reason, node, OPTIONS[0] if later is None else OPTIONS[1])
            elif user not in inside and val(user) is not None:
                why = translations[0].outside[user]
                return Refusal(f"{why.reason}, so all of `{node.name}` is needed", why.node or user)
    for t in translations:
        for node in t.body.graph.nodes:
            if node.op == "call_function" and not allowed(node.target):
                return Refusal(f"{node.target} has no place in a body", t.products[0].node)
    return None
