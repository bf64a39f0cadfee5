"""The part of the HTML report on what runs where."""

from __future__ import annotations

from graphopt.report.markup import Markup, join, prose, tag
from graphopt.report.model import Report
from graphopt.report.partition import PartitionRegion, TorchPart
from graphopt.report.partition_text import (
    assigned_text,
    operators_text,
    partition_lines,
    speedup,
    tensors_text,
    time_text,
    title_text,
    weights_text,
)
from graphopt.report.tables import Column, source_text, table
from graphopt.report.text import speedup_text


def partition_page(report: Report) -> Markup:
    """Empty where everything runs in torch because nothing else was asked for."""
    found = report.partition
    if found is None:
        return Markup()
    notes = (f"{region.name}: {note}" for region in found.regions for note in region.notes)
    return join(
        tag("h2", title_text(found)),
        tag("p", next(partition_lines(found))),
        *([table(found.regions, _REGIONS)] if found.regions else []),
        *([table(found.torch, _TORCH)] if found.torch else []),
        *(tag("p", prose(note), class_="faint") for note in notes),
    )


_REGIONS: list[Column[PartitionRegion]] = [
    Column("region", lambda r: tag("b", r.name)),
    Column("nodes", lambda r: str(len(r.nodes)), lambda r: len(r.nodes)),
    Column("operators", lambda r: operators_text(r.operators)),
    Column("tensors", tensors_text),
    Column("time", lambda r: time_text(r.seconds), lambda r: r.seconds),
    Column("in torch", lambda r: time_text(r.torch_seconds), lambda r: r.torch_seconds),
    Column("speedup", lambda r: speedup_text(speedup(r)), speedup),
    Column("weights", weights_text),
    Column("runs on", assigned_text),
    Column("first source line", lambda r: source_text(r.source)),
]

_TORCH: list[Column[TorchPart]] = [
    Column("in torch", lambda p: str(len(p.nodes)), lambda p: len(p.nodes)),
    Column("reason", lambda p: prose(p.reason)),
    Column("operators", lambda p: operators_text(p.operators)),
    Column("first source line", lambda p: source_text(p.source)),
]
