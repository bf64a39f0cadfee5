"""From a graph to the text of a body."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.kernels.chunked_rows.vocabulary import allowed


def spell(
    inputs: Sequence[fx.Node],
    rows: Sequence[fx.Node],
    sums: Sequence[fx.Node],
    columns: Sequence[fx.Node] = (),
) -> str:
    """The text of a graph.

    Args:
        inputs: its parameters, in order.
        rows: nodes that hold values per row, ``(n, ...)``.
        sums: nodes that hold sums over rows, without axes.
        columns: matrices ``(n, V)`` whose columns are summed up.

    Raises:
        ValueError: a node cannot be part of a body.
    """
    lines = [f"def body({', '.join(n.name for n in inputs)}):"]
    for node in _needed([*rows, *sums, *columns]):
        if node.op == "call_function":
            lines.append(f"    {node.name} = {_call(node)}")
        elif node not in inputs:
            raise ValueError(f"`{node.name}` is computed from, and is not among the inputs")
    groups = (rows, sums, columns) if columns else (rows, sums)
    listed = (f"[{', '.join(n.name for n in group)}]" for group in groups)
    return "\n".join([*lines, f"    return {', '.join(listed)}"])


def _needed(results: Sequence[fx.Node]) -> list[fx.Node]:
    """What results are computed from, in the order of the graph."""
    needed: set[fx.Node] = set()
    queue = list(results)
    while queue:
        node = queue.pop()
        if node not in needed:
            needed.add(node)
            queue += node.all_input_nodes
    return sorted(needed)


def _call(node: fx.Node) -> str:
    if not allowed(node.target):
        raise ValueError(f"{node.target} cannot be part of a body")
    args = [_spelled(a) for a in node.args]
    args += [f"{k}={_spelled(v)}" for k, v in node.kwargs.items()]
    name = "item" if node.target is operator.getitem else str(node.target)
    return f"{name}({', '.join(args)})"


def _spelled(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_spelled, value))}]"
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value)
    raise ValueError(f"{type(value).__name__} cannot be part of a body")
