"""Whether two values are the same, though computed twice."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphopt.program import is_random


def alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values are computed in the same way from the same."""
    queue, seen = [(one, other)], set[tuple[fx.Node, fx.Node]]()
    while queue:
        pair = queue.pop()
        if pair[0] is pair[1] or pair in seen:
            continue
        seen.add(pair)
        if not _called_alike(*pair):
            return False
        queue += zip(*(node.all_input_nodes for node in pair), strict=True)
    return True


def _called_alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes differ in nothing but the nodes that they read."""
    if not one.op == other.op == "call_function" or one.target is not other.target:
        return False
    words = [fx.node.map_arg((n.args, n.kwargs), _places(n).__getitem__) for n in (one, other)]
    return not is_random(one) and _spelled(words[0]) == _spelled(words[1])


def _places(node: fx.Node) -> dict[fx.Node, str]:
    return {read: f"%{k}" for k, read in enumerate(node.all_input_nodes)}


def _spelled(words: Any) -> str:
    """Arguments as text, which tells ``True`` from ``1``."""
    args, kwargs = words
    return repr((args, sorted(kwargs.items())))
