"""The report as sections of short tables and lines, before they become text or styled output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from graphopt.report.explain import missed_lines
from graphopt.report.groups import applied_rules, missed_reasons, totals
from graphopt.report.model import PassSummary, Report
from graphopt.report.partition_text import (
    COLUMNS,
    partition_lines,
    partition_rows,
    title_text,
)
from graphopt.report.quantized_summary import (
    FORMATS,
    LAYERS,
    format_rows,
    layer_rows,
    quantized_lines,
)
from graphopt.report.text import (
    bytes_text,
    certificate_text,
    change_text,
    counted,
    error_text,
    outcome_text,
    seconds_text,
    speedup_text,
    verdict_text,
)

Row = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A titled table (``columns``, ``rows``), or lines under a title."""

    title: str
    columns: Row = ()
    rows: tuple[Row, ...] = ()
    lines: tuple[str, ...] = ()


def sections(report: Report, *, verbose: bool = False) -> list[Section]:
    """The sections that have something to say; the first is the header."""
    found = [
        _header(report),
        _passes(report),
        _applied(report),
        _quantized(report),
        _partition(report),
        _missed(report),
        _whole(report),
        Section("Notes", lines=tuple(report.notes)),
    ]
    if verbose:
        found += [
            _every_weight(report),
            _every_rewrite(report),
            _every_miss(report),
            _environment(report),
        ]
    return [s for s in found if s.rows or s.lines]


def _header(report: Report) -> Section:
    return Section(f"{report.model}: {verdict_text(report)}", lines=tuple(_figures(report)))


def _figures(report: Report) -> Iterator[str]:
    found = totals(report)
    if not report.passes:
        yield "no pass ran"
    else:
        refused = counted(found.missed, "candidate was refused", "candidates were refused")
        yield f"{outcome_text(found)}; {refused}"
    if found.nodes:
        yield f"nodes {change_text(*found.nodes)}"
    if found.bytes and any(found.bytes):
        yield f"parameters and buffers {' -> '.join(map(bytes_text, found.bytes))}"
    if report.seconds:
        stages = (f"{k} {seconds_text(v)}" for k, v in report.seconds.items() if k != "total")
        yield f"took {seconds_text(found.seconds)} ({', '.join(stages)})"


def _passes(report: Report) -> Section:
    columns = ("pass", "outcome", "nodes", "size", "time", "verification")
    return Section("Passes", columns, tuple(map(_pass_row, report.passes)))


def _pass_row(summary: PassSummary) -> Row:
    size = (summary.bytes_before, summary.bytes_after)
    return (
        summary.name,
        outcome_text(summary),
        change_text(summary.nodes_before, summary.nodes_after),
        " -> ".join(map(bytes_text, size)) if size[0] != size[1] else bytes_text(size[0]),
        seconds_text(summary.seconds),
        seconds_text(summary.verify_seconds),
    )


def _applied(report: Report) -> Section:
    rows = tuple(
        (
            group.rule,
            group.pass_name,
            str(len(group.rewrites)),
            change_text(group.removed, group.added),
            speedup_text(group.speedup) or "not timed",
            group.worst.numeric,
            certificate_text(group.worst),
        )
        for group in applied_rules(report)
    )
    columns = ("rule", "pass", "count", "nodes", "speedup", "class", "worst certificate")
    return Section("Applied", columns, rows)


def _quantized(report: Report) -> Section:
    lines = tuple(quantized_lines(report))
    return Section("Quantization", FORMATS, format_rows(report), lines)


def _partition(report: Report) -> Section:
    found = report.partition
    title = title_text(found) if found is not None else ""
    return Section(title, COLUMNS, partition_rows(found), tuple(partition_lines(found)))


def _every_weight(report: Report) -> Section:
    return Section("Every quantized weight", LAYERS, layer_rows(report))


def _missed(report: Report) -> Section:
    groups = missed_reasons(report.missed)
    return Section("Not rewritten", lines=tuple(line for g in groups for line in missed_lines(g)))


def _whole(report: Report) -> Section:
    rows = tuple(
        (c.rule, c.numeric, certificate_text(c), f"largest {error_text(c.max_error)}", *c.notes[:1])
        for c in report.whole
    )
    return Section("Whole program", ("compared", "class", "error", "", ""), rows)


def _every_rewrite(report: Report) -> Section:
    rows = tuple(
        (
            a.rule,
            ", ".join(a.removed),
            ", ".join(a.added),
            speedup_text(a.speedup),
            certificate_text(a.certificate),
            a.source or "",
        )
        for a in report.applied
    )
    return Section(
        "Every rewrite", ("rule", "removed", "added", "speedup", "certificate", "source"), rows
    )


def _every_miss(report: Report) -> Section:
    rows = tuple(
        (m.rule, m.stage, m.node or "", m.reason, m.option or "", m.source or "")
        for m in report.missed
    )
    return Section("Every miss", ("rule", "stage", "node", "reason", "allowed by", "source"), rows)


def _environment(report: Report) -> Section:
    return Section("Environment", lines=tuple(f"{k} {v}" for k, v in report.environment.items()))
