"""A benchmark of an ONNX file as one HTML page: times, and bars of where they go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphopt.onnx_files.bench import FileBench, FileTiming
from graphopt.onnx_files.profile import NodeTime, OperatorTime, Profile
from graphopt.report.frame import framed
from graphopt.report.markup import Markup, join, tag
from graphopt.report.plots import line, number, rectangle, text, told
from graphopt.report.scales import linear
from graphopt.report.tables import Column, card, table
from graphopt.report.text import bytes_text, seconds_text

WIDTH, LEFT, RIGHT, ROW, FOOT = 960, 250, 90, 22, 40
MOST = 20
"""Operators that have a bar each; the others share one."""


def render_profile(found: FileBench) -> str:
    """One self-contained page that runs no script and loads nothing; every name is escaped."""
    head = tag("header", tag("h1", found.model))
    body = tag("main", tag("section", *_parts(found)))
    return framed(f"{found.model}: profile in ONNX Runtime", join(head, "\n", body))


def _parts(found: FileBench) -> Iterator[Markup]:
    yield tag("div", *map(_card, found.rows), class_="cards")
    for index, (name, profile) in enumerate(found.profiles.items()):
        yield tag("h2", f"{name.capitalize()}: {seconds_text(profile.seconds)} in kernels")
        yield bars(profile, f"bars-{index}", name)
        yield tag("h2", f"Operators of the {name} file")
        yield table(profile.operators, _OPERATORS)
        yield tag("h2", f"Slowest nodes of the {name} file")
        yield table(profile.slowest, _NODES)
    inputs = ", ".join(f"{k} {v}" for k, v in found.shapes.items())
    machine = ", ".join(f"{k} {v}" for k, v in found.environment.items())
    yield tag("p", f"Inputs: {inputs}. {' '.join(found.notes)}", class_="faint")
    yield tag("p", machine, class_="faint")


def _card(row: FileTiming) -> Markup:
    remark = f"{row.speedup:.2f}x the original, {bytes_text(row.bytes)}"
    return card(row.name, seconds_text(row.median), remark, "good" if row.speedup > 1 else "")


_OPERATORS: Sequence[Column[OperatorTime]] = (
    Column("operator", lambda o: tag("b", o.operator)),
    Column("count", lambda o: str(o.count), lambda o: o.count),
    Column("total ms", lambda o: f"{o.seconds * 1e3:.3f}", lambda o: o.seconds),
    Column("share", lambda o: f"{o.share:.1%}", lambda o: o.share),
)
_NODES: Sequence[Column[NodeTime]] = (
    Column("node", lambda n: tag("span", n.name, class_="node")),
    Column("operator", lambda n: n.operator),
    Column("ms", lambda n: f"{n.seconds * 1e3:.3f}", lambda n: n.seconds),
    Column("share", lambda n: f"{n.share:.1%}", lambda n: n.share),
    Column("outputs", lambda n: n.shapes),
)


def bars(profile: Profile, name: str, of: str) -> Markup:
    """A bar for each operator, its time of a run along the bottom."""
    rows = _rows(profile.operators)
    if not rows:
        return tag("p", "No kernel ran.", class_="empty")
    axis = linear("ms of a run", [row.seconds * 1e3 for row in rows], zero=True)
    height = ROW * len(rows) + FOOT
    low = ROW * len(rows)

    def across(seconds: float) -> float:
        return LEFT + axis.at(seconds * 1e3) * (WIDTH - LEFT - RIGHT)

    marks = [_bar(row, place, across(row.seconds)) for place, row in enumerate(rows)]
    rulers = [
        part
        for value, label in axis.ticks
        for part in (
            line(across(value * 1e-3), 0, across(value * 1e-3), low, "grid"),
            text(across(value * 1e-3), low + 16, label, "middle"),
        )
    ]
    first = rows[0]
    words = f"{len(profile.operators)} operators. Most takes {first.operator}: {_told(first)}."
    return tag(
        "svg",
        tag("title", f"Time of each operator in the {of} file", id=f"{name}-title"),
        tag("desc", words, id=f"{name}-told"),
        *rulers,
        *marks,
        text((LEFT + WIDTH - RIGHT) / 2, height - 6, axis.title, "middle", "name"),
        class_="plot",
        viewBox=f"0 0 {WIDTH} {number(height)}",
        role="img",
        aria_labelledby=f"{name}-title {name}-told",
    )


def _bar(row: OperatorTime, place: int, end: float) -> Markup:
    top = place * ROW
    return told(
        f"{row.operator}: {_told(row)}",
        rectangle(0, top, WIDTH, ROW, "hit"),
        text(LEFT - 8, top + ROW * 0.68, _short(row.operator), "end", "name"),
        rectangle(LEFT, top + 3, end - LEFT, ROW - 6, "after"),
        text(end + 6, top + ROW * 0.68, f"{row.share:.1%}", "start"),
    )


def _rows(operators: Sequence[OperatorTime]) -> list[OperatorTime]:
    head, rest = list(operators[:MOST]), operators[MOST:]
    if not rest:
        return head
    count, seconds, share = (
        sum(getattr(o, f) for o in rest) for f in ("count", "seconds", "share")
    )
    return [*head, OperatorTime(f"{len(rest)} others", int(count), seconds, share)]


def _told(row: OperatorTime) -> str:
    nodes = "1 node" if row.count == 1 else f"{row.count} nodes"
    return f"{seconds_text(row.seconds)}, {row.share:.1%} of the time, {nodes}"


def _short(name: str) -> str:
    return name if len(name) <= 34 else f"{name[:33]}…"
