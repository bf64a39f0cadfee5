"""The report as one HTML page that opens offline and loads nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import quote

from graphopt.report.frame import file_text, filled, framed
from graphopt.report.graph_data import graph_data
from graphopt.report.groups import (
    AppliedRule,
    MissedReason,
    Totals,
    applied_rules,
    missed_reasons,
    operators,
    totals,
)
from graphopt.report.markup import Markup, join, prose, script_data, tag
from graphopt.report.model import Report
from graphopt.report.partition_page import partition_page
from graphopt.report.quantized_page import quantized_page
from graphopt.report.serial import plain
from graphopt.report.tables import (
    Column,
    applied_table,
    badge,
    card,
    certificates_table,
    change,
    meter,
    missed_table,
    option_text,
    passes_table,
    percent,
    source_text,
    table,
)
from graphopt.report.text import (
    bytes_text,
    certificate_text,
    counted,
    seconds_text,
    speedup_text,
    verdict_text,
)

SCRIPTS = (
    "tables.js",
    "graph_model.js",
    "graph_layout.js",
    "graph_canvas.js",
    "graph_details.js",
    "graph.js",
    "page.js",
)


def render_html(report: Report) -> str:
    """One self-contained page: summary, passes, rewrites, misses, certificates and both graphs.

    Every name is escaped; the page's policy lets no script run but its own, and loads nothing.
    """
    quantized = quantized_page(report)
    body = filled(
        "page.html",
        model=join(report.model),
        verdict=_verdict(report),
        applied_count=str(len(report.applied)),
        missed_count=str(len(report.missed)),
        overview=_overview(report),
        applied=_or(report.applied, applied_table(report), "Nothing was rewritten."),
        missed=_or(report.missed, missed_table(report), "No candidate was left alone."),
        certificates=_certificates(report),
        quantized_link=_quantized_link(quantized),
        quantized=tag("section", quantized, id="quantization", data_tab=True) if quantized else "",
        details=_details(report),
        data=script_data("graph-data", graph_data(report)),
    )
    title = f"{report.model}: graphopt report"
    return framed(title, body, "\n".join(map(file_text, SCRIPTS)))


def _quantized_link(quantized: Markup) -> Markup:
    return tag("a", "Quantization", href="#quantization") if quantized else Markup()


def _verdict(report: Report) -> Markup:
    state = "good" if report.verified else "bad" if report.whole else "open"
    return tag("span", verdict_text(report), class_=f"verdict {state}")


def _or(rows: Iterable[object], shown: Markup, otherwise: str) -> Markup:
    return shown if rows else tag("p", otherwise, class_="empty")


def _overview(report: Report) -> Markup:
    return join(
        tag("div", *_cards(totals(report)), class_="cards"),
        partition_page(report),
        tag("h2", "Passes"),
        _or(report.passes, passes_table(report), "No pass ran."),
        tag("h2", "Applied"),
        _or(report.applied, _rules_table(report), "Nothing was rewritten."),
        tag("h2", "Not rewritten"),
        _or(report.missed, _reasons_table(report), "No candidate was left alone."),
        *([tag("h2", "Notes"), _list(report.notes)] if report.notes else []),
    )


def _cards(found: Totals) -> Iterator[Markup]:
    yield card("kept", str(found.kept), f"of {found.matched} matched", "good")
    yield card("slower here", str(found.slower), "correct, but not kept", "warn")
    yield card("rolled back", str(found.rolled_back), "did not verify", "bad")
    yield card("refused", str(found.missed), "each with its reason")
    if found.nodes:
        yield card("nodes", change(*map(str, found.nodes)), f"{percent(*found.nodes)}, {_NODES}")
    if found.bytes and any(found.bytes):
        size = change(*map(bytes_text, found.bytes))
        yield card("parameters and buffers", size, percent(*found.bytes))
    if found.seconds:
        yield card("took", seconds_text(found.seconds), "verification included")


def _rules_table(report: Report) -> Markup:
    columns: list[Column[AppliedRule]] = [
        Column("rule", lambda g: _filtered("applied", g.rule, g.rule)),
        Column("pass", lambda g: g.pass_name),
        Column("count", lambda g: str(len(g.rewrites)), lambda g: len(g.rewrites)),
        Column(
            "nodes",
            lambda g: change(str(g.removed), str(g.added)),
            lambda g: g.added - g.removed,
        ),
        Column("speedup", lambda g: speedup_text(g.speedup) or "not timed", lambda g: g.speedup),
        Column("class", lambda g: g.worst.numeric),
        Column("worst certificate", lambda g: join(meter(g.worst), certificate_text(g.worst))),
    ]
    return table(applied_rules(report), columns)


def _reasons_table(report: Report) -> Markup:
    columns: list[Column[MissedReason]] = [
        Column("rule", lambda g: _filtered("missed", g.first.rule, g.first.rule)),
        Column("count", lambda g: str(len(g.rewrites)), lambda g: len(g.rewrites)),
        Column("outcome", lambda g: badge(g.first.stage)),
        Column("reason", lambda g: prose(g.first.reason)),
        Column("allowed by", lambda g: option_text(g.option)),
        Column("first source line", lambda g: source_text(g.source)),
    ]
    return table(missed_reasons(report.missed), columns)


def _filtered(tab: str, rule: str, text: str) -> Markup:
    return tag("a", tag("b", text), href=f"#{tab}&rule={quote(rule, safe='')}")


def _certificates(report: Report) -> Markup:
    own = [a.certificate for a in report.applied]
    return join(
        tag("h2", "Whole program"),
        _or(report.whole, certificates_table(report.whole), "The whole was not compared."),
        tag("h2", "Rewrites"),
        _or(own, certificates_table(own, searchable=True), "There are none."),
        tag("p", _GLOSSARY, class_="faint"),
    )


_NODES = "calls of operators"
"""What counts as a node wherever the page gives a number of them."""

_GLOSSARY = (
    "Errors are against a float64 run, as RMS relative to the reference's RMS. Before: the error "
    "of what stood there. Runs: sets of inputs, those of the capture, fresh ones, and sizes not "
    "seen at capture."
)


def _details(report: Report) -> Markup:
    recipe = json.dumps(plain(report.recipe), indent=2)
    seconds = {name: seconds_text(value) for name, value in report.seconds.items()}
    return join(
        tag("h2", "Recipe"),
        _or(report.recipe, tag("pre", recipe), "None was given."),
        tag("h2", "Time"),
        _or(report.seconds, _pairs(seconds), "Not measured."),
        tag("h2", "Environment"),
        _or(report.environment, _pairs(report.environment), "Not recorded."),
        tag("p", f"Report schema {report.schema}, {_graph_sizes(report)}.", class_="faint"),
    )


def _graph_sizes(report: Report) -> str:
    before, after = map(operators, (report.graph_before, report.graph_after))
    sizes = f"{counted(before, 'node')} before and {counted(after, 'node')} after"
    return f"graphs of {sizes} ({_NODES})"


def _pairs(values: Mapping[str, str]) -> Markup:
    return tag("dl", *(join(tag("dt", k), tag("dd", v)) for k, v in values.items()))


def _list(lines: Iterable[str]) -> Markup:
    return tag("ul", *(tag("li", prose(line)) for line in lines))
