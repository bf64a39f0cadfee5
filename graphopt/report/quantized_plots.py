"""Plots of a quantized model: SQNR and bytes of each layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from graphopt.report.markup import Markup, join, tag
from graphopt.report.plots import (
    Frame,
    legend,
    marker,
    rectangle,
    told,
)
from graphopt.report.quantized import QuantizedLayer
from graphopt.report.quantized_text import (
    cosine_text,
    format_text,
    shape_text,
    sqnr_text,
    worst,
)
from graphopt.report.scales import Axis, linear, round_step, sizes
from graphopt.report.text import bytes_text

MOST_LABELS = 24
BAR, NARROW = 0.76, 4.0
"""Of what each layer has of the width; below so many pixels of it there are no gaps."""

MANY = 200
"""Layers from which on marks are small, and blocks are not shaded."""

_BLOCK = re.compile(r"^(.*?\.\d+)(?:\.|$)")


def sqnr_plot(layers: Sequence[QuantizedLayer]) -> Markup:
    """One mark per layer, in the order of the model, in the colour of its format."""
    names = list(dict.fromkeys(format_text(layer) for layer in layers))
    known = [layer.sqnr for layer in layers if layer.sqnr is not None]
    y = linear("SQNR, dB", known or [0.0], least=10.0)
    frame = Frame("plot-sqnr", layer_axis(layers), y)
    lowest = worst(layers)
    words = f"{len(layers)} layers."
    if lowest is not None:
        words += f" The lowest is that of {lowest.names[0]}: {_sqnr(lowest)}."
    marks = [
        told(_told(layer), _column(frame, place), _mark(frame, place, layer, names))
        for place, layer in enumerate(layers)
        if layer.error is not None
    ]
    title = "Signal to quantization noise ratio of each layer"
    drawn = frame.draw(title, words, *marks, behind=_bands(frame, layers))
    return join(legend(names), drawn)


def bytes_plot(layers: Sequence[QuantizedLayer]) -> Markup:
    """What each weight took and takes, the second bar in front of the first."""
    most = [max(layer.bytes_before, layer.bytes_after) for layer in layers]
    frame = Frame("plot-bytes", layer_axis(layers), sizes("size", most))
    before, after = (
        sum(getattr(layer, name) for layer in layers) for name in ("bytes_before", "bytes_after")
    )
    words = f"All weights together: {bytes_text(before)} before, {bytes_text(after)} after."
    marks = [
        told(_told(layer), _column(frame, place), *_bars(frame, place, layer))
        for place, layer in enumerate(layers)
    ]
    keys = ("before", "after")
    shown = (tag("span", tag("i", class_=key), key) for key in keys)
    title = "Size of each layer before and after"
    drawn = frame.draw(title, words, *marks, behind=_bands(frame, layers))
    return join(tag("p", *shown, class_="keys"), drawn)


def layer_axis(layers: Sequence[QuantizedLayer]) -> Axis:
    """Layers from 0 to their number; labels are those of blocks, where names have any."""
    blocks, count = _blocks(layers), len(layers)
    numbered = [(first, last, int(name.rpartition(".")[2])) for name, first, last in blocks if name]
    if len(numbered) > 1:
        every = max(1, round(round_step(len(numbered), MOST_LABELS)))
        ticks = [((a + b) / 2, str(number)) for a, b, number in numbered if number % every == 0]
        return Axis("layers in the order of the model, by block", 0, max(count, 1), tuple(ticks))
    every = max(1, round(round_step(count, 12)))
    places = [0, *range(every - 1, count, every)] if every > 1 else range(count)
    ticks = [(place + 0.5, str(place + 1)) for place in places]
    return Axis("layers in the order of the model", 0, max(count, 1), tuple(ticks))


def _blocks(layers: Sequence[QuantizedLayer]) -> list[tuple[str, int, int]]:
    """Runs of neighbours in one block: its path (empty for none), where it starts and ends."""
    found = []
    for name, run in groupby(range(len(layers)), lambda i: _block(layers[i])):
        places = list(run)
        found.append((name, places[0], places[-1] + 1))
    return found


def _block(layer: QuantizedLayer) -> str:
    match = _BLOCK.match(layer.names[0]) if layer.names else None
    return match[1] if match else ""


def _bands(frame: Frame, layers: Sequence[QuantizedLayer]) -> Markup:
    """Every other block is shaded."""
    if len(layers) > MANY:
        return Markup()
    runs = [run for run in _blocks(layers) if run[0]]
    shown = (
        rectangle(left, frame.down(1), right - left, frame.down(0) - frame.down(1), "band")
        for _, first, last in (runs[1::2] if len(runs) > 1 else ())
        for left, right in [(_across(frame, first), _across(frame, last))]
    )
    return join(*shown)


def _across(frame: Frame, place: float) -> float:
    return frame.across(frame.x.at(place))


def _column(frame: Frame, place: int) -> Markup:
    """Where a pointer finds the layer."""
    left, right = _across(frame, place), _across(frame, place + 1)
    return rectangle(left, frame.down(1), right - left, frame.down(0) - frame.down(1), "hit")


def _mark(frame: Frame, place: int, layer: QuantizedLayer, names: Sequence[str]) -> Markup:
    """Exact ones are hollow, at the top; those without a signal hollow, at the bottom."""
    colour, small = names.index(format_text(layer)), frame.x.high > MANY
    x = _across(frame, place + 0.5)
    if layer.sqnr is None:
        return marker(x, frame.down(0.0 if layer.error else 1.0), colour, "hollow", small=small)
    return marker(x, frame.down(frame.y.at(layer.sqnr)), colour, small=small)


def _bars(frame: Frame, place: int, layer: QuantizedLayer) -> Iterator[Markup]:
    slot = _across(frame, 1) - _across(frame, 0)
    middle, low = _across(frame, place + 0.5), frame.down(0)
    widest = slot if slot < NARROW else min(BAR * slot, 40.0)
    inner = widest if slot < NARROW else 0.6 * widest
    for size, width, kind in (
        (layer.bytes_before, widest, "before"),
        (layer.bytes_after, inner, "after"),
    ):
        top = frame.down(frame.y.at(size))
        yield rectangle(middle - width / 2, top, width, low - top, kind)


def _told(layer: QuantizedLayer) -> str:
    size = f"{bytes_text(layer.bytes_before)} before, {bytes_text(layer.bytes_after)} after"
    parts = [
        ", ".join(layer.names),
        f"{'+'.join(layer.operators)} {shape_text(layer.shape)}, {format_text(layer)}",
        f"SQNR {_sqnr(layer)}",
        f"cosine {cosine_text(layer.cosine)}" if layer.cosine is not None else "",
        size,
    ]
    return "\n".join(filter(None, parts))


def _sqnr(layer: QuantizedLayer) -> str:
    return sqnr_text(layer.sqnr, layer.error)
