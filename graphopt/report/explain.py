"""In words: why was this not rewritten?"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator

from graphopt.errors import GraphoptError
from graphopt.report.groups import MissedReason, missed_reasons
from graphopt.report.model import Applied, MissedRewrite, NodeView, Report
from graphopt.report.quantized_summary import layer_text, quantized_lines
from graphopt.report.text import certificate_text, counted, printable, speedup_text

_OPENINGS = {
    "match": "{rule} found something that looks alike, but not what it rewrites: {reason}",
    "check": "{rule} does not apply: {reason}",
    "verify": "{rule} was tried and taken back, its result did not verify: {reason}",
    "profit": "{rule} was tried and taken back, it does not pay on this machine: {reason}",
}


def explain_lines(report: Report, node: str | None = None) -> list[str]:
    """What was noted, and why places were not rewritten, grouped by the user's source line.

    Args:
        node: a node's name, a module's path, or a ``file.py:line``; only what concerns it, and
            what was rewritten there too.

    Raises:
        GraphoptError: the report knows no such node, module or line.
    """
    if node is not None:
        lines = _about(report, node)
    else:
        lines = [*report.notes, *quantized_lines(report), *_by_source(report.missed)]
        if not report.missed:
            lines.append(_ALL if report.applied else _NOTHING)
    return [printable(line) for line in lines]


_ALL = "Every candidate that was found was rewritten."
_NOTHING = "No rule found a candidate: nothing in this model looks like what the passes rewrite."


def _by_source(missed: Iterable[MissedRewrite]) -> Iterator[str]:
    places: dict[str, list[MissedRewrite]] = defaultdict(list)
    for row in missed:
        places[row.source or ""].append(row)
    for place, rows in places.items():
        yield f"{place}:" if place else "(source line unknown)"
        for group in missed_reasons(rows):
            yield from (f"  {line}" for line in missed_lines(group, show_source=False))


def missed_lines(group: MissedReason, *, show_source: bool = True) -> list[str]:
    """One reason in words: what, where, how often, and the option that would allow it."""
    first, count = group.first, len(group.rewrites)
    opening = _OPENINGS.get(first.stage, _OPENINGS["check"])
    lines = [opening.format(rule=first.rule, reason=first.reason)]
    often, more = (f"{count} times", "first ") if count > 1 else ("", "")
    where = f"{more}at node {first.node}" if first.node else ""
    if often or where:
        lines.append("  " + ", ".join(filter(None, (often, where))))
    if show_source and group.source:
        lines.append(f"  {more}source line: {group.source}")
    if group.option:
        named = first.stage == "profit" or group.option.startswith(f"{first.pass_name}:")
        owner = "" if named else f"{first.pass_name} "
        lines.append(f"  allowed by: {owner}{group.option}")
    return lines


def _about(report: Report, asked: str) -> list[str]:
    names = _nodes_named(report, asked)
    missed = [m for m in report.missed if m.node in names or _is_line(m.source, asked)]
    applied = [a for a in report.applied if names & {*a.removed, *a.added}]
    lines = [_rewritten(a, names) for a in applied]
    found = report.quantization
    layers = found.layers if found is not None else ()
    lines += [layer_text(row) for row in layers if row.node in names or asked in row.names]
    lines += _by_source(missed)
    return lines or [
        f"No rule found a candidate at {asked}: nothing there looks like what the passes rewrite."
    ]


def _nodes_named(report: Report, asked: str) -> set[str]:
    """Names of the nodes that are called, belong to the module, or stem from the line."""
    views = [*report.graph_before, *report.graph_after]
    names = {v.name for v in views if _answers(v, asked)}
    mentioned = {m.node for m in report.missed} | {
        n for a in report.applied for n in (*a.removed, *a.added)
    }
    if asked in mentioned:
        names.add(asked)
    sources = [m.source for m in report.missed] + [a.source for a in report.applied]
    if not names and not any(_is_line(s, asked) for s in sources):
        raise _unknown(asked, {v.name for v in views} | {n for n in mentioned if n})
    return names


def _answers(view: NodeView, asked: str) -> bool:
    inside = view.module == asked or view.module.startswith(f"{asked}.")
    return (
        asked in (view.name, view.target)
        or (bool(asked) and inside)
        or _is_line(view.source, asked)
    )


def _is_line(source: str | None, asked: str) -> bool:
    """Whether ``source`` is the line ``asked``, which may leave out leading folders."""
    if source is None or ":" not in asked:
        return False
    return source == asked or source.endswith((f"/{asked}", f"\\{asked}"))


def _unknown(asked: str, names: set[str]) -> GraphoptError:
    close = difflib.get_close_matches(asked, names, n=3)
    return GraphoptError(
        f"the graph has no node, module or source line {asked!r}",
        fix=f"did you mean {', '.join(close)}?" if close else "the HTML report lists the nodes",
    )


def _rewritten(applied: Applied, names: set[str]) -> str:
    """What one kept rewrite did, in a sentence."""
    gained = f", {speedup_text(applied.speedup)} as fast" if applied.speedup else ""
    removed = sorted(names & {*applied.removed}) or sorted(applied.removed)
    shown = ", ".join(removed[:4]) + (f" and {len(removed) - 4} more" if len(removed) > 4 else "")
    result = ", ".join(applied.added[:4]) or "nothing"
    if len(applied.added) > 4:
        result = counted(len(applied.added), "node")
    return (
        f"{applied.rule} rewrote {shown} into {result} "
        f"({certificate_text(applied.certificate)}{gained})."
    )
