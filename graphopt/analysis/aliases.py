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

_LISTS = (aten.broadcast_tensors.default, aten.meshgrid.default, aten.meshgrid.indexing)
"""Operators that return a view of each tensor in a list."""

_UNDECLARED = frozenset(
    {
        *_LISTS,
        aten._unsafe_view.default,
        aten.dropout.default,
        aten.einsum.default,
        aten.sum_to_size.default,
        aten.to_dense.default,
        aten.type_as.default,
        aten.unsafe_split.Tensor,
        aten.unsafe_split_with_sizes.default,
        operator.getitem,
    }
)
"""Operators that may hand their input's memory on without saying so in their schema."""


def is_view(node: fx.Node) -> bool:
    """Whether the value may share memory with one of the node's arguments."""
    if node.target in _UNDECLARED:
        return bool(_sources(node))
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None for r in node.target._schema.returns)


def _sources(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments whose memory a view may share."""
    if node.target in _LISTS:
        return tuple(node.args[0])  # type: ignore[arg-type]
    if node.target is aten.einsum.default:  # a sum of one tensor may only reorder its axes
        operands: tuple[fx.Node, ...] = tuple(node.args[1])  # type: ignore[arg-type]
        return operands if len(operands) == 1 else ()
    if node.target is operator.getitem and (whole := node.args[0]).target in _LISTS:
        return (whole.args[0][node.args[1]],)
    return tuple(a for a in node.args[:1] if isinstance(a, fx.Node))


def memory_of(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` is a view of; the node itself where it is no view."""
    while is_view(node) and len(sources := _sources(node)) == 1:
        node = sources[0]
    return node


def is_returned(node: fx.Node) -> bool:
    """Whether an output of the program (an updated buffer too) is this value or a view of it."""
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            if user.op == "output":
                return True
            if user not in seen and is_view(user) and not seen.isdisjoint(_through(user)):
                seen.add(user)
                queue.append(user)
    return False


def _through(node: fx.Node) -> tuple[fx.Node, ...]:
    """What a view shares memory with, lists of views included."""
    return (*_sources(node), *node.all_input_nodes[: node.target is operator.getitem])
