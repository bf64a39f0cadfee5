"""What became of each node between the graph before and the graph after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from graphopt.report.model import NodeView

STATE = frozenset({"parameter", "buffer", "constant"})


class Change(StrEnum):
    """``REMOVED``, ``ADDED``: only in one of the graphs. ``ALTERED``: in both, but not the same."""

    SAME = "same"
    REMOVED = "removed"
    ADDED = "added"
    ALTERED = "altered"


def changes(
    before: Sequence[NodeView], after: Sequence[NodeView]
) -> tuple[dict[str, Change], dict[str, Change]]:
    """The change of every node by name, in the graph before and in the graph after.

    Where one of the graphs is empty there is nothing to compare, and nothing changed.
    """
    if not before or not after:
        return {v.name: Change.SAME for v in before}, {v.name: Change.SAME for v in after}
    old, new = _by_name(before), _by_name(after)
    return (
        {name: _change(name, old, new, Change.REMOVED) for name in old},
        {name: _change(name, new, old, Change.ADDED) for name in new},
    )


def _by_name(views: Sequence[NodeView]) -> dict[str, NodeView]:
    return {view.name: view for view in views}


def _change(
    name: str, mine: Mapping[str, NodeView], other: Mapping[str, NodeView], gone: Change
) -> Change:
    twin = other.get(name)
    if twin is None or twin.op != mine[name].op:
        return gone
    same = _content(mine[name], mine) == _content(twin, other)
    return Change.SAME if same else Change.ALTERED


def _content(view: NodeView, graph: Mapping[str, NodeView]) -> tuple[object, ...]:
    """What a node computes, whichever nodes feed it: reading a renamed value is no change."""
    state = tuple(n for n in view.inputs if n in graph and graph[n].op in STATE)
    return view.shape, view.literals, view.rewritten_by, state
