"""The part of the HTML report on quantization."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphopt.report.markup import Markup, join, prose, tag
from graphopt.report.model import Report, Trade
from graphopt.report.quantized import (
    FloatWeight,
    OutputFidelity,
    Quantization,
    QuantizedLayer,
)
from graphopt.report.quantized_plots import bytes_plot, sqnr_plot
from graphopt.report.quantized_text import (
    cosine_text,
    format_text,
    measured_on,
    shape_text,
    sqnr_text,
    worst,
)
from graphopt.report.tables import (
    Column,
    Filter,
    badge,
    card,
    change,
    node_link,
    option_text,
    percent,
    source_text,
    table,
)
from graphopt.report.text import bytes_text, counted, error_text, seconds_text
from graphopt.report.trade_plots import trade_plots


def quantized_page(report: Report) -> Markup:
    """Empty where nothing could be quantized and nothing was searched."""
    parts = []
    if report.quantization is not None:
        parts += [*_quantization(report.quantization)]
    if report.trades:
        parts += _trades(report.trades)
    return join(*parts)


def _quantization(found: Quantization) -> Iterator[Markup]:
    yield tag("div", *_cards(found), class_="cards")
    if found.outputs:
        yield tag("h2", "Outputs of the model")
        yield _outputs(found.outputs)
    if found.layers:
        yield tag("h2", "Signal to quantization noise ratio")
        yield sqnr_plot(found.layers)
        yield tag("h2", "Size")
        yield bytes_plot(found.layers)
        yield tag("h2", "Layers")
        yield _layers(found.layers)
        yield tag("p", f"Measured on {measured_on(found)}. {_GLOSSARY}", class_="faint")
    yield tag("h2", "Left in floats")
    yield _floats(found.floats) if found.floats else tag("p", "Nothing is.", class_="empty")


_GLOSSARY = (
    "Errors are those of what is computed with a weight, against the same in float64. "
    "SQNR is -20 log10 of the relative RMS error. KL divergence is that of softmax of the "
    "quantized model's logits from the original's, a mean over rows, in nats. Time is that of the "
    "graph run operator by operator."
)


def _cards(found: Quantization) -> Iterator[Markup]:
    layers = found.layers
    yield card(
        "weights in few bits", str(len(layers)), f"{len(found.floats)} left in floats", "good"
    )
    size = (found.bytes_before, found.bytes_after)
    yield card("parameters and buffers", change(*map(bytes_text, size)), percent(*size))
    lowest = worst(layers)
    if lowest is not None:
        shown = sqnr_text(lowest.sqnr, lowest.error)
        yield card("lowest SQNR of a layer", shown, lowest.names[0] if lowest.names else "")
    if found.seconds_before is not None and found.seconds_after is not None:
        times = (found.seconds_before, found.seconds_after)
        shown = change(*map(seconds_text, times))
        yield card("one run", shown, percent(*times))


def _outputs(outputs: Sequence[OutputFidelity]) -> Markup:
    columns: list[Column[OutputFidelity]] = [
        Column("output", lambda o: tag("b", o.name)),
        Column("shape", lambda o: shape_text(o.shape)),
        Column("SQNR", lambda o: sqnr_text(o.sqnr, o.error), lambda o: o.sqnr),
        Column("cosine", lambda o: cosine_text(o.cosine), lambda o: o.cosine),
        Column("error", lambda o: error_text(o.error), lambda o: o.error),
        Column("KL divergence", _divergence, lambda o: o.divergence),
    ]
    return table(outputs, columns)


def _divergence(output: OutputFidelity) -> str:
    return "no logits" if output.divergence is None else f"{output.divergence:.3g} nats"


def _layers(layers: Sequence[QuantizedLayer]) -> Markup:
    columns: list[Column[QuantizedLayer]] = [
        Column("weight", lambda row: _names(row.names)),
        Column("read by", lambda row: join(node_link(row.node), " ", "+".join(row.operators))),
        Column("shape", lambda row: shape_text(row.shape)),
        Column("format", format_text),
        Column(
            "size",
            lambda row: change(bytes_text(row.bytes_before), bytes_text(row.bytes_after)),
            lambda row: row.bytes_after - row.bytes_before,
        ),
        Column("SQNR", lambda row: sqnr_text(row.sqnr, row.error), lambda row: row.sqnr),
        Column("cosine", lambda row: cosine_text(row.cosine), lambda row: row.cosine),
        Column("error", lambda row: error_text(row.error), lambda row: row.error),
        *_optional(layers),
        Column("source", lambda row: source_text(row.source)),
    ]
    return table(layers, columns, [Filter("format", format_text)])


def _optional(layers: Sequence[QuantizedLayer]) -> Iterator[Column[QuantizedLayer]]:
    """Columns that not every report has something for."""
    if any(row.seconds_after is not None for row in layers):
        yield Column("time", _time, lambda row: row.seconds_after)
    if any(row.note for row in layers):
        yield Column("remarks", lambda row: prose(row.note))


def _time(row: QuantizedLayer) -> str:
    if row.seconds_before is None or row.seconds_after is None:
        return "not timed"
    return change(seconds_text(row.seconds_before), seconds_text(row.seconds_after))


def _floats(rows: Sequence[FloatWeight]) -> Markup:
    columns: list[Column[FloatWeight]] = [
        Column("weight", lambda row: _names(row.names)),
        Column("shape", lambda row: shape_text(row.shape)),
        Column("dtype", lambda row: row.dtype),
        Column("size", lambda row: bytes_text(row.bytes), lambda row: row.bytes),
        Column("outcome", lambda row: badge(row.stage)),
        Column("reason", lambda row: prose(row.reason)),
        Column("allowed by", lambda row: option_text(row.option)),
    ]
    return table(rows, columns, [])


def _names(names: Sequence[str]) -> Markup:
    lines = (tag("div", name, class_="node") for name in names)
    return join(*lines)


def _trades(trades: Sequence[Trade]) -> list[Markup]:
    columns: list[Column[Trade]] = [
        Column("size", lambda t: bytes_text(t.bytes), lambda t: t.bytes),
        Column("estimated loss", lambda t: f"{t.loss:.3g}", lambda t: t.loss),
        Column("quality", _quality, lambda t: t.quality),
        Column("", lambda t: tag("b", "chosen") if t.chosen else ""),
    ]
    what = f"{counted(len(trades), 'set', 'sets')} of formats that the search for bits looked at."
    return [
        tag("h2", "Search for bits"),
        tag("p", f"{what} The line joins those that no other beats; the ring is the chosen one."),
        trade_plots(trades),
        table(trades, columns, []),
    ]


def _quality(trade: Trade) -> str:
    return "not measured" if trade.quality is None else f"{trade.quality:.5g}"
