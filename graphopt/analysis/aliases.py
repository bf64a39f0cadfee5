"""Which values share memory: what a caller could reach by writing into an output of the model.

Inside a functional program sharing never matters. It does at the border: a tensor that is returned
must stay distinct from the model's own state, from the caller's inputs and from the other outputs
where the original kept them distinct.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

aten = torch.ops.aten

_UNDECLARED = frozenset({aten._unsafe_view.default, aten.dropout.default, operator.getitem})
"""Operators that hand their input's memory on without saying so in their schema."""


def is_view(node: fx.Node) -> bool:
    """Whether the value may share memory with the node's first argument."""
    if node.target in _UNDECLARED:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None for r in node.target._schema.returns)


def memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` is a view of; the node itself where it is no view."""
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def is_returned(node: fx.Node) -> bool:
    """Whether an output of the program (an updated buffer too) is this value or a view of it."""
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            if user.op == "output":
                return True
            if user not in seen and is_view(user) and user.args[0] in seen:
                seen.add(user)
                queue.append(user)
    return False
