"""The graphs before and after, folded and arranged, as the data that the page's script draws."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graphopt.report.changes import Change, changes
from graphopt.report.fold import Box, Item, fold, reads_of
from graphopt.report.layers import level
from graphopt.report.model import Applied, MissedRewrite, NodeView, Report
from graphopt.report.text import certificate_text, short_source, speedup_text


class Strings:
    """A table of distinct strings, so that a path in a thousand nodes is written once."""

    def __init__(self) -> None:
        self.index: dict[str, int] = {}

    def __call__(self, text: str | None) -> int:
        return self.index.setdefault(text or "", len(self.index))

    @property
    def table(self) -> list[str]:
        return list(self.index)


def graph_data(report: Report) -> dict[str, Any]:
    """Everything the graph view shows.

    Strings in nodes are positions in ``strings``. Items are positions of nodes, or
    ``-1 - position`` of a box.
    """
    strings = Strings()
    before, after = changes(report.graph_before, report.graph_after)
    return {
        "before": _graph(report.graph_before, before, strings),
        "after": _graph(report.graph_after, after, strings),
        "rewrites": [_rewrite(a) for a in report.applied],
        "misses": [_miss(m) for m in report.missed if m.node],
        "strings": strings.table,
    }


def _graph(
    views: Sequence[NodeView], change: Mapping[str, Change], strings: Strings
) -> dict[str, Any]:
    position = {view.name: i for i, view in enumerate(views)}
    short = {source: short_source(source) for source in {v.source for v in views}}
    nodes = [
        [
            view.name,
            change[view.name].value,
            [position[n] for n in view.inputs if n in position],
            [strings(rule) for rule in view.rewritten_by],
            *map(strings, (*_texts(view), short[view.source])),
        ]
        for view in views
    ]
    return {"nodes": nodes, "boxes": _boxes(views, change) if views else []}


def _texts(view: NodeView) -> tuple[str | None, ...]:
    """In the order in which the script names them."""
    return view.op, view.shape, view.module, view.source, view.literals, view.target


def _boxes(views: Sequence[NodeView], change: Mapping[str, Change]) -> list[dict[str, Any]]:
    """Boxes with the outermost first; each names its items by position."""
    reads = reads_of(views)
    users: dict[int, list[int]] = defaultdict(list)
    for node, sources in reads.items():
        for source in sources:
            users[source].append(node)
    boxes = list(_walk(fold(views, change)))
    number = {id(box): i for i, box in enumerate(boxes)}

    def reference(item: Item) -> int:
        return item if isinstance(item, int) else -1 - number[id(item)]

    rows = []
    for box in boxes:
        drawn = level(box, reads, users)
        changed = [change[views[n].name] for n in box.nodes]
        rows.append(
            {
                "name": box.name,
                "label": box.label,
                "kind": box.kind.value,
                "size": len(box.nodes),
                "changed": {c.value: changed.count(c) for c in set(changed) - {Change.SAME}},
                "items": [reference(item) for item in box.items],
                "rows": drawn.rows,
                "edges": drawn.edges,
            }
        )
    return rows


def _walk(box: Box) -> Iterator[Box]:
    yield box
    for item in box.items:
        if isinstance(item, Box):
            yield from _walk(item)


def _rewrite(applied: Applied) -> dict[str, Any]:
    return {
        "rule": applied.rule,
        "pass": applied.pass_name,
        "removed": applied.removed,
        "added": applied.added,
        "speedup": speedup_text(applied.speedup),
        "certificate": certificate_text(applied.certificate),
    }


def _miss(missed: MissedRewrite) -> dict[str, Any]:
    return {
        "rule": missed.rule,
        "pass": missed.pass_name,
        "stage": missed.stage,
        "reason": missed.reason,
        "option": missed.option or "",
        "node": missed.node,
    }
