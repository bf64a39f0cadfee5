"""The plot of a search for bits: what each set of formats takes, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from graphopt.report.markup import Markup, tag
from graphopt.report.model import Trade
from graphopt.report.plots import Frame, joined, marker, told
from graphopt.report.scales import linear, positive, sizes
from graphopt.report.text import bytes_text

WIDTH = 560

Value = Callable[[Trade], float]


def trade_plots(trades: Sequence[Trade]) -> Markup:
    """Size against loss, and against quality where that was measured."""
    return tag("div", *_panels(trades), class_="panels")


def _panels(trades: Sequence[Trade]) -> Iterator[Markup]:
    lost = [t for t in trades if math.isfinite(t.loss)]
    if lost:
        yield _panel("plot-loss", "loss", lost, lambda t: t.loss)
    judged = [t for t in trades if t.quality is not None and math.isfinite(t.quality)]
    if judged:
        yield _panel("plot-quality", "quality", judged, lambda t: -(t.quality or 0.0))


def _panel(name: str, what: str, trades: Sequence[Trade], cost: Value) -> Markup:
    """Args: cost: smaller is better."""
    sign = 1 if what == "loss" else -1
    values = [sign * cost(t) for t in trades]
    y = positive("estimated loss", values) if sign > 0 else linear("quality", values)
    frame = Frame(name, sizes("size of the model", [t.bytes for t in trades], zero=False), y, WIDTH)
    best = frontier(trades, cost)

    def place(trade: Trade) -> tuple[float, float]:
        return frame.place(trade.bytes, sign * cost(trade))

    marks = [
        told(_told(t), marker(*place(t), 0, "chosen" if t.chosen else "" if t in best else "other"))
        for t in sorted(trades, key=lambda t: t.chosen)
    ]
    words = f"{len(trades)} sets of formats, {len(best)} of which no other beats."
    words += "".join(f" Chosen: {_told(t)}." for t in trades if t.chosen)
    title = f"Size against {'estimated loss' if sign > 0 else 'quality'}"
    return frame.draw(title, words, joined(map(place, best), "frontier"), *marks)


def frontier(trades: Iterable[Trade], cost: Value) -> list[Trade]:
    """Those that no other beats in size at the same cost or less, by size."""
    found: list[Trade] = []
    for trade in sorted(trades, key=lambda t: (t.bytes, cost(t))):
        if not found or cost(trade) < cost(found[-1]):
            found.append(trade)
    return found


def _told(trade: Trade) -> str:
    judged = "" if trade.quality is None else f", quality {trade.quality:.4g}"
    chosen = ", chosen" if trade.chosen else ""
    return f"{bytes_text(trade.bytes)}, loss {trade.loss:.3g}{judged}{chosen}"
