"""Values that are views of a weight."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt.analysis.aliases import is_view
from graphopt.analysis.purity import is_pure
from graphopt.program import Program


def viewed(program: Program, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """The weight that a value is, or is a view of, and that view of its tensor.

    ``None`` where it is computed, or where sizes of inputs decide on the view.
    """
    steps = []
    while node.op == "call_function" and is_view(node) and len(node.all_input_nodes) == 1:
        steps.append(node)
        node = node.all_input_nodes[0]
    target = program.target_of(node)
    if target is None:
        return None
    value = whole = program.state[target].detach()
    with torch.no_grad():
        for step in reversed(steps):
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), lambda _, v=value: v)
            value = step.target(*args, **kwargs)  # type: ignore[operator]
    if not isinstance(value, Tensor) or value.dtype != whole.dtype:
        return None
    same = value.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    return (node, value) if same else None


def place(value: Tensor) -> tuple[object, ...]:
    """Which numbers of a tensor a view shows, in which order."""
    return value.storage_offset(), tuple(value.shape), value.stride()


def constants(program: Program) -> set[fx.Node]:
    """State that does not change, and what is computed from nothing else."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        if inputs and is_pure(node):
            if found.issuperset(inputs):
                found.add(node)
        elif program.is_constant(node):
            found.add(node)
    return found
