"""Quantization in a few lines of text, for the terminal."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from graphopt.report.model import Report, Trade
from graphopt.report.quantized import Quantization, QuantizedLayer
from graphopt.report.quantized_text import (
    Format,
    cosine_text,
    format_text,
    formats,
    measured_on,
    names_text,
    output_text,
    shape_text,
    sqnr_text,
    worst,
)
from graphopt.report.text import bytes_text, counted, error_text, seconds_text

Row = tuple[str, ...]

FORMATS: Row = ("format", "weights", "size", "lowest SQNR", "of")
LAYERS: Row = ("weight", "shape", "format", "size", "SQNR", "cosine", "error", "remarks")

_VARIES = re.compile(r"`[^`]*`|\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def quantized_lines(report: Report) -> list[str]:
    """How many weights, what they take, how near layers and outputs are, what was searched."""
    found = report.quantization
    lines = [] if found is None else [*_figures(found), *_remarks(found.layers)]
    return [*lines, *_searched(report.trades)]


def _figures(found: Quantization) -> Iterator[str]:
    left, size = len(found.floats), sum(weight.bytes for weight in found.floats)
    floats = f"{left} left in floats ({bytes_text(size)})" if left else "none left in floats"
    stored = counted(len(found.layers), "weight")
    whole = " -> ".join(map(bytes_text, (found.bytes_before, found.bytes_after)))
    yield f"{stored} in few bits, {floats}; the model {whole}"
    lowest = worst(found.layers)
    if lowest is not None:
        sqnr = sqnr_text(lowest.sqnr, lowest.error)
        yield f"lowest SQNR {sqnr}, of {names_text(lowest.names)}, on {measured_on(found)}"
    yield from (f"output {output.name}: {output_text(output)}" for output in found.outputs)
    if found.seconds_before is not None and found.seconds_after is not None:
        times = seconds_text(found.seconds_before), seconds_text(found.seconds_after)
        yield f"one run, operator by operator: {' -> '.join(times)}"


def _remarks(layers: Sequence[QuantizedLayer]) -> Iterator[str]:
    """What there is to say of layers; remarks that differ in names and numbers are one."""
    groups: dict[str, list[QuantizedLayer]] = defaultdict(list)
    for layer in layers:
        for part in filter(None, layer.note.split("; ")):
            groups[_VARIES.sub("#", part)].append(layer)
    for kind, rows in groups.items():
        parts = rows[0].note.split("; ")
        first = next(part for part in parts if _VARIES.sub("#", part) == kind)
        often = f"{len(rows)} weights, the first " if len(rows) > 1 else ""
        yield f"{often}{names_text(rows[0].names)}: {first}"


def _searched(trades: Sequence[Trade]) -> Iterator[str]:
    if not trades:
        return
    looked = counted(len(trades), "set of formats", "sets of formats")
    chosen = next((t for t in trades if t.chosen), None)
    yield f"search for bits: {looked} looked at{_chosen(chosen)}"


def _chosen(trade: Trade | None) -> str:
    if trade is None:
        return ", none chosen"
    judged = "" if trade.quality is None else f", quality {trade.quality:.4g}"
    return f"; chosen: {bytes_text(trade.bytes)}, estimated loss {trade.loss:.3g}{judged}"


def format_rows(report: Report) -> tuple[Row, ...]:
    """One row per format."""
    found = report.quantization
    return tuple(map(_format_row, formats(found))) if found is not None else ()


def _format_row(group: Format) -> Row:
    lowest = group.worst
    return (
        group.name,
        str(len(group.layers)),
        " -> ".join(map(bytes_text, group.bytes)),
        sqnr_text(lowest.sqnr, lowest.error) if lowest else _known(group.layers),
        names_text(lowest.names) if lowest else "",
    )


def _known(layers: Sequence[QuantizedLayer]) -> str:
    """Where no layer has an error."""
    return "exact" if all(layer.error == 0 for layer in layers) else "not measured"


def layer_rows(report: Report) -> tuple[Row, ...]:
    """One row per weight."""
    found = report.quantization
    return tuple(map(_layer_row, found.layers)) if found is not None else ()


def _layer_row(layer: QuantizedLayer) -> Row:
    return (
        ", ".join(layer.names),
        shape_text(layer.shape),
        format_text(layer),
        " -> ".join(map(bytes_text, (layer.bytes_before, layer.bytes_after))),
        sqnr_text(layer.sqnr, layer.error),
        cosine_text(layer.cosine),
        error_text(layer.error),
        layer.note,
    )


def layer_text(layer: QuantizedLayer) -> str:
    """One weight in a sentence."""
    size = " -> ".join(map(bytes_text, (layer.bytes_before, layer.bytes_after)))
    cosine = f", cosine {cosine_text(layer.cosine)}" if layer.cosine is not None else ""
    note = f"; {layer.note}" if layer.note else ""
    return (
        f"{', '.join(layer.names)} is stored as {format_text(layer)}, {size}: "
        f"SQNR {sqnr_text(layer.sqnr, layer.error)}{cosine}{note}."
    )
