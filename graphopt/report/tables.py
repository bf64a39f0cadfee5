"""The tables of the HTML report: they read without scripts, which only sort and filter them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import quote

from graphopt.report.groups import STAGES, strain
from graphopt.report.markup import BREAK, Markup, join, prose, tag
from graphopt.report.model import Applied, Certificate, MissedRewrite, PassSummary, Report
from graphopt.report.text import (
    bytes_text,
    certificate_text,
    counted,
    error_text,
    seconds_text,
    share_text,
    short_source,
    speedup_text,
)

T = TypeVar("T")

SHOWN_NODES = 6


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column: what it shows, and the number it sorts by where text order would be wrong.

    Columns of numbers stand to the right unless they hold more than a number (``left``).
    """

    title: str
    show: Callable[[T], str]
    sort: Callable[[T], float | None] | None = None
    left: bool = False

    @property
    def style(self) -> str | None:
        return None if self.sort is None or self.left else "number"

    def cell(self, row: T) -> Markup:
        if self.sort is None:
            return tag("td", self.show(row))
        value = self.sort(row)
        known = value is not None and math.isfinite(value)
        return tag("td", self.show(row), class_=self.style, data_value=str(value) if known else "")

    def head(self) -> Markup:
        first = "descending" if self.sort else "ascending"
        return tag("th", self.title, scope="col", class_=self.style, data_first=first)


@dataclass(frozen=True)
class Filter(Generic[T]):
    """A choice above a table that keeps the rows with one value."""

    key: str
    value: Callable[[T], str]
    names: Mapping[str, str] | None = None


def table(
    rows: Sequence[T], columns: Sequence[Column[T]], filters: Sequence[Filter[T]] | None = None
) -> Markup:
    """A table; with ``filters`` (possibly none) it gets a search field, and its columns sort."""
    head = tag("thead", tag("tr", *(c.head() for c in columns)))
    body = tag("tbody", *(_row(row, columns, filters or ()) for row in rows))
    framed = tag("div", tag("table", head, body), class_="scroll")
    if filters is None:
        return framed
    return tag("div", _tools(rows, filters), framed, class_="searchable")


def _row(row: T, columns: Sequence[Column[T]], filters: Iterable[Filter[T]]) -> Markup:
    keys = {f"data-{f.key}": f.value(row) for f in filters}
    return tag("tr", *(c.cell(row) for c in columns), **keys)


def _tools(rows: Sequence[T], filters: Iterable[Filter[T]]) -> Markup:
    search = tag("input", type="search", placeholder="Search", aria_label="Search this table")
    chosen = [_choice(rows, f) for f in filters]
    count = tag("output", counted(len(rows), "row"), class_="count")
    return tag("div", search, *chosen, count, class_="tools")


def _choice(rows: Sequence[T], by: Filter[T]) -> Markup:
    names = by.names or {}
    found = dict.fromkeys(by.value(row) for row in rows)
    options = [tag("option", names.get(v, v), value=v) for v in sorted(found)]
    every = tag("option", f"every {by.key}", value="")
    return tag("select", every, *options, data_filter=by.key, aria_label=f"Only one {by.key}")


def node_link(name: str) -> Markup:
    """A node's name that leads to it in the graph."""
    return tag("a", name, href=f"#graph&node={quote(name, safe='')}", class_="node")


def _nodes(names: Sequence[str]) -> Markup:
    shown = [node_link(n) for n in names[:SHOWN_NODES]]
    rest = names[SHOWN_NODES:]
    if rest:
        shown.append(tag("span", f"and {len(rest)} more", title=", ".join(rest), class_="faint"))
    return join(*(part for name in shown for part in (name, " ")))


def source_text(source: str | None) -> Markup:
    parts = short_source(source).split("/")
    steps = (join(part, "/", BREAK) for part in parts[:-1])
    return tag("span", *steps, parts[-1], title=source or "", class_="source")


def option_text(option: str | None) -> str:
    return tag("code", option) if option else ""


def badge(stage: str) -> Markup:
    return tag("span", STAGES.get(stage, stage), class_=f"badge {stage if stage in STAGES else ''}")


def meter(certificate: Certificate) -> Markup:
    """How much of the allowed error was used, as a bar."""
    used = strain(certificate)
    width = min(max(used, 0.0), 1.0) * 100
    bar = tag("i", style=f"width:{width:.0f}%")
    share = f"{used:.0%} of the allowed error" if math.isfinite(used) else "not within any bound"
    return tag("span", bar, class_=f"meter {'over' if used > 1 else ''}", title=share)


def change(before: str, after: str) -> str:
    """``300 → 240``, or the one figure where nothing changed."""
    return after if before == after else f"{before} → {after}"


def percent(before: float, after: float) -> str:
    """By how much a figure fell or rose."""
    if before == after:
        return "unchanged"
    return f"{(after - before) / before:+.1%}" if before else ""


def card(name: str, value: str, remark: str, state: str = "") -> Markup:
    """One figure of a summary; ``state`` colours it unless it is 0."""
    state = "" if value == "0" else state
    return tag(
        "div",
        tag("span", name, class_="name"),
        tag("strong", value),
        tag("span", remark, class_="remark"),
        class_=f"card {state}",
    )


def passes_table(report: Report) -> Markup:
    columns: list[Column[PassSummary]] = [
        Column("pass", lambda p: join(tag("b", p.name), " ", _options(p))),
        Column("matched", lambda p: str(p.matched), lambda p: p.matched),
        Column("kept", lambda p: str(p.kept), lambda p: p.kept),
        Column("slower", lambda p: str(p.slower), lambda p: p.slower),
        Column("rolled back", lambda p: str(p.rolled_back), lambda p: p.rolled_back),
        Column(
            "nodes",
            lambda p: change(str(p.nodes_before), str(p.nodes_after)),
            lambda p: p.nodes_after - p.nodes_before,
        ),
        Column(
            "size",
            lambda p: change(bytes_text(p.bytes_before), bytes_text(p.bytes_after)),
            lambda p: p.bytes_after - p.bytes_before,
        ),
        Column("time", lambda p: seconds_text(p.seconds), lambda p: p.seconds),
        Column(
            "verification", lambda p: seconds_text(p.verify_seconds), lambda p: p.verify_seconds
        ),
    ]
    return table(report.passes, columns)


def _options(summary: PassSummary) -> str:
    given = ", ".join(f"{key}={value}" for key, value in summary.options.items())
    return tag("code", given, class_="faint") if given else ""


def applied_table(report: Report) -> Markup:
    columns: list[Column[Applied]] = [
        Column("rule", lambda a: tag("b", a.rule)),
        Column("pass", lambda a: a.pass_name),
        Column("removed", lambda a: _nodes(a.removed)),
        Column("added", lambda a: _nodes(a.added)),
        Column("speedup", lambda a: speedup_text(a.speedup) or "not timed", lambda a: a.speedup),
        Column("class", lambda a: a.certificate.numeric),
        Column(
            "error",
            lambda a: join(meter(a.certificate), certificate_text(a.certificate)),
            lambda a: strain(a.certificate),
            left=True,
        ),
        Column("source", lambda a: source_text(a.source)),
    ]
    return table(report.applied, columns, [Filter("rule", lambda a: a.rule)])


def missed_table(report: Report) -> Markup:
    columns: list[Column[MissedRewrite]] = [
        Column("rule", lambda m: tag("b", m.rule)),
        Column("pass", lambda m: m.pass_name),
        Column("outcome", lambda m: badge(m.stage)),
        Column("reason", lambda m: prose(m.reason)),
        Column("node", lambda m: node_link(m.node) if m.node else ""),
        Column("allowed by", lambda m: option_text(m.option)),
        Column("source", lambda m: source_text(m.source)),
    ]
    filters: list[Filter[MissedRewrite]] = [
        Filter("rule", lambda m: m.rule),
        Filter("outcome", lambda m: m.stage, STAGES),
    ]
    return table(report.missed, columns, filters)


def certificates_table(rows: Sequence[Certificate], *, searchable: bool = False) -> Markup:
    columns: list[Column[Certificate]] = [
        Column("rule", lambda c: join(tag("b", c.rule), f" v{c.version}")),
        Column("class", lambda c: c.numeric),
        Column("used", meter, strain, left=True),
        Column("error", lambda c: error_text(c.error), lambda c: c.error),
        Column("allowed", lambda c: error_text(c.bound), lambda c: c.bound),
        Column("largest", lambda c: error_text(c.max_error), lambda c: c.max_error),
        Column("before", lambda c: error_text(c.original_error), lambda c: c.original_error),
        Column("gradients", _gradients, lambda c: c.gradient_error),
        Column("runs", lambda c: str(c.runs), lambda c: c.runs),
        Column("inputs", lambda c: tag("code", c.inputs_hash[:10], title=c.inputs_hash)),
        Column("nodes", lambda c: _nodes(c.nodes)),
        Column("remarks", lambda c: "; ".join(c.notes)),
    ]
    return table(rows, columns, [Filter("rule", lambda c: c.rule)] if searchable else None)


def _gradients(certificate: Certificate) -> str:
    if certificate.gradient_error is None:
        return "none"
    allowed = error_text(certificate.gradient_bound)
    text = f"{error_text(certificate.gradient_error)}, allowed {allowed}"
    return "; ".join(filter(None, (text, share_text(certificate.gradient_share))))
