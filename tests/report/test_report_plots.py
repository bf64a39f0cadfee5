"""Plots: round ticks, marks where their numbers are, names escaped, one layer and a thousand."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from report_samples import layer, quantization, small_report

from graphopt.report import Quantization, QuantizedLayer, Report, Trade
from graphopt.report.html import render_html
from graphopt.report.quantized_plots import bytes_plot, sqnr_plot
from graphopt.report.quantized_text import cosine_text, format_text
from graphopt.report.scales import Axis, linear, positive, round_step, sizes
from graphopt.report.trade_plots import frontier, trade_plots


def pictures(markup: str) -> list[ElementTree.Element]:
    """The plots among it, each as strict XML."""
    found = re.findall(r'<svg class="plot".*?</svg>', markup, re.DOTALL)
    return [ElementTree.fromstring(text) for text in found]


def groups(picture: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """Marks by what they say, its first line."""
    marks = [g for g in picture.iter("g") if g.find("title") is not None]
    return {(g.findtext("title") or "").split("\n")[0]: g for g in marks}


def height(picture: ElementTree.Element, label: str) -> float:
    """Where a label of the vertical axis stands."""
    ends = [t for t in picture.iter("text") if t.get("text-anchor") == "end" and t.text == label]
    return float(ends[0].get("y", "")) - 4


def where(group: ElementTree.Element) -> tuple[float, float]:
    path = group.find("path")
    assert path is not None
    x, y = re.findall(r"[\d.]+", path.get("transform", ""))
    return float(x), float(y)


def layers(count: int) -> list[QuantizedLayer]:
    return [
        layer(f"h.{i // 4}.m{i % 4}.weight", sqnr=20.0 + i % 7, error=0.1) for i in range(count)
    ]


@pytest.mark.parametrize("span", [1e-9, 0.03, 0.7, 1.0, 7.0, 99.0, 3e12])
def test_steps_are_round(span: float) -> None:
    step = round_step(span)
    assert span / 6.0001 <= step <= span / 2
    digits = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(digits - d) for d in (1, 2, 5)) < 1e-6


RANGES = [(23.9, 41.2), (0.0, 1.0), (-3.7, 12.0), (5.0, 5.0), (0.0, 0.0), (1e-7, 3e-7), (0, 1e9)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_axes_end_at_round_numbers_around_their_values(low: float, high: float) -> None:
    axis = linear("x", [low, high])
    values = [value for value, _ in axis.ticks]
    assert axis.low <= low <= high <= axis.high and axis.low < axis.high
    assert [values[0], values[-1]] == [axis.low, axis.high]
    assert 2 <= len(values) <= 9
    assert len({label for _, label in axis.ticks}) == len(values)
    assert all(float(label) == pytest.approx(value, abs=1e-12) for value, label in axis.ticks)
    assert (axis.at(axis.low), axis.at(axis.high)) == (0.0, 1.0)


def test_losses_over_decades_have_a_logarithmic_axis() -> None:
    axis = positive("loss", [0.002, 40.0])
    assert [label for _, label in axis.ticks] == ["1e-3", "1e-2", "1e-1", "1e0", "1e1", "1e2"]
    assert axis.at(0.1) == pytest.approx(0.4)
    assert not positive("loss", [0.2, 0.4]).log
    assert not positive("loss", [0.0, 40.0]).log


def test_bytes_have_the_unit_of_the_largest() -> None:
    axis = sizes("size", [576 * 1024, 2.25 * 1024**2])
    assert axis.title == "size, MiB"
    assert axis.ticks[1] == (0.5 * 1024**2, "0.5")
    assert sizes("size", [0, 900]).title == "size, B"
    assert sizes("size", [1024]).title == "size, KiB"


def test_each_layer_stands_at_its_ratio_in_the_order_of_the_model() -> None:
    rows = [layer("a.weight", sqnr=30.0), layer("b.weight", sqnr=24.5), layer("c.weight", sqnr=36)]
    (picture,) = pictures(sqnr_plot(rows))
    found = groups(picture)
    assert list(found) == ["a.weight", "b.weight", "c.weight"]
    scale = (height(picture, "36") - height(picture, "24")) / 12
    for row in rows:
        at = height(picture, "24") + (row.sqnr - 24) * scale
        assert where(found[row.names[0]])[1] == pytest.approx(at, abs=0.2)
    columns = [where(group)[0] for group in found.values()]
    assert columns == sorted(columns)
    assert columns[1] - columns[0] == pytest.approx(columns[2] - columns[1], abs=0.2)


def test_a_mark_says_its_name_and_numbers() -> None:
    (picture,) = pictures(sqnr_plot([layer("a.weight")]))
    (title,) = [g.findtext("title") for g in picture.iter("g")]
    assert title == (
        "a.weight\nlinear 64\N{MULTIPLICATION SIGN}32, int4 in groups of 32 with zero points\n"
        "SQNR 20.0 dB\ncosine 0.995\n8 KiB before, 1.25 KiB after"
    )


def test_formats_have_colours_and_shapes_and_a_legend() -> None:
    rows = [layer("a"), layer("b", bits=8), layer("c"), layer("d", dtype="nf4", symmetric=True)]
    markup = sqnr_plot(rows)
    (picture,) = pictures(markup)
    paths = {name: group.find("path") for name, group in groups(picture).items()}
    kinds = {name: path.get("class") for name, path in paths.items() if path is not None}
    assert kinds == {"a": "s0", "b": "s1", "c": "s0", "d": "s2"}
    assert len({path.get("d") for path in paths.values() if path is not None}) == 3
    keys = re.findall(r"</svg>([^<]*)</span>", markup.partition('class="plot"')[0])
    assert keys == [format_text(row) for row in (rows[0], rows[1], rows[3])]


def test_exact_layers_stand_at_the_top_and_unmeasured_ones_nowhere() -> None:
    rows = [
        layer("a", sqnr=30.0),
        layer("exact", error=0.0, sqnr=None),
        layer("silent", error=0.5, sqnr=None, cosine=None),
        layer("unknown", error=None, sqnr=None, cosine=None),
    ]
    (picture,) = pictures(sqnr_plot(rows))
    found = groups(picture)
    assert set(found) == {"a", "exact", "silent"}
    assert where(found["exact"])[1] < where(found["a"])[1] < where(found["silent"])[1]
    assert "SQNR exact" in (found["exact"].findtext("title") or "")
    assert "SQNR no signal" in (found["silent"].findtext("title") or "")
    pictures(sqnr_plot(rows[1:2]))  # nothing but exact ones


def test_bars_are_as_high_as_sizes() -> None:
    rows = [layer("a", bytes_before=4096, bytes_after=1024), layer("b", bytes_before=2048)]
    (picture,) = pictures(bytes_plot(rows))
    found = groups(picture)
    bars = {
        (name, rect.get("class")): float(rect.get("height", ""))
        for name, group in found.items()
        for rect in group.iter("rect")
    }
    per_kib = (height(picture, "0") - height(picture, "4")) / 4
    assert bars["a", "before"] == pytest.approx(4 * per_kib, abs=0.2)
    assert bars["a", "after"] == pytest.approx(1 * per_kib, abs=0.2)
    assert bars["b", "before"] == pytest.approx(2 * per_kib, abs=0.2)
    assert bars["b", "after"] == pytest.approx(1.25 * per_kib, abs=0.2)


@pytest.mark.parametrize("count", [1, 2, 7, 40, 1000])
def test_any_number_of_layers(count: int) -> None:
    for markup in (sqnr_plot(layers(count)), bytes_plot(layers(count))):
        (picture,) = pictures(markup)
        assert len(groups(picture)) == count
        labels = [t for t in picture.iter("text") if t.get("text-anchor") == "middle"]
        assert len(labels) <= 2 + 26
        places = [float(n.get("x", "0")) for n in picture.iter() if n.get("x")]
        assert min(places) >= 0 and max(places) <= 960
        assert len(markup) < 1000 * max(count, 30)


def test_blocks_label_the_axis() -> None:
    (picture,) = pictures(sqnr_plot([*layers(12), layer("pooler.weight")]))
    texts = [t.text for t in picture.iter("text")]
    assert "layers in the order of the model, by block" in texts
    assert [t for t in texts if t in ("0", "1", "2", "3")] == ["0", "1", "2"]
    assert sum(r.get("class") == "band" for r in picture.iter("rect")) == 1
    (plain,) = pictures(sqnr_plot([layer(f"l{i}.weight") for i in range(3)]))
    assert "layers in the order of the model" in [t.text for t in plain.iter("text")]


def test_pictures_are_described() -> None:
    markup = sqnr_plot([layer("a.weight", sqnr=30.0, error=0.03), layer("b.weight")])
    (picture,) = pictures(markup)
    assert picture.get("role") == "img"
    ids = (picture.get("aria-labelledby") or "").split()
    named = {n.get("id"): n for n in picture if n.get("id")}
    assert [named[i].tag for i in ids] == ["title", "desc"]
    assert "The lowest is that of b.weight: 20.0 dB." in (named[ids[1]].text or "")


def test_names_are_escaped() -> None:
    name = "a</title></svg><script>alert(1)</script>&'\""
    for markup in (sqnr_plot([layer(name)]), bytes_plot([layer(name)])):
        assert "<script" not in markup
        (picture,) = pictures(markup)
        assert list(groups(picture)) == [name]


def beaten(trade: Trade, trades: list[Trade]) -> bool:
    return any(
        (t.bytes <= trade.bytes and t.loss < trade.loss)
        or (t.bytes < trade.bytes and t.loss <= trade.loss)
        for t in trades
    )


def test_the_frontier_is_what_no_other_beats() -> None:
    trades = [Trade(100 + 37 * i % 60, float((i * 53) % 41)) for i in range(50)]
    best = frontier(trades, lambda t: t.loss)
    assert {(t.bytes, t.loss) for t in best} == {
        (t.bytes, t.loss) for t in trades if not beaten(t, trades)
    }
    assert [t.bytes for t in best] == sorted(t.bytes for t in best)


def test_trades_against_loss_and_quality() -> None:
    trades = [
        Trade(4 * 1024**2, 0.5, 0.7),
        Trade(6 * 1024**2, 0.2, 0.9, chosen=True),
        Trade(7 * 1024**2, 0.3, 0.95),
        Trade(8 * 1024**2, 0.1),
    ]
    loss, quality = pictures(trade_plots(trades))
    marks = groups(loss)
    assert len(marks) == 4 and len(groups(quality)) == 3
    chosen = marks["6 MiB, loss 0.2, quality 0.9, chosen"].find("path")
    assert chosen is not None and chosen.get("class") == "s0 chosen"
    other = marks["7 MiB, loss 0.3, quality 0.95"].find("path")
    assert other is not None and other.get("class") == "s0 other"
    (line,) = loss.iter("polyline")
    assert len((line.get("points") or "").split()) == 3
    best = [where(groups(quality)[name]) for name in groups(quality)]
    assert min(best, key=lambda at: at[1])[0] == max(best)[0]
    (line,) = quality.iter("polyline")
    assert len((line.get("points") or "").split()) == 3


@pytest.mark.parametrize("trades", [[Trade(1, 0.0)], [Trade(5, math.nan)], [Trade(5, math.inf, 1)]])
def test_trades_of_any_number(trades: list[Trade]) -> None:
    found = pictures(trade_plots(trades))
    assert len(found) == sum([math.isfinite(trades[0].loss), trades[0].quality is not None])


def test_the_page_has_the_tab_where_there_is_something_to_show() -> None:
    assert "#quantization" not in render_html(Report("plain"))
    text = render_html(small_report())
    assert len(pictures(text)) == 4
    for words in ("saw no calibration rows", "0.0125 nats", "no logits", "the model writes"):
        assert words in text
    only = Report("m", quantization=Quantization(floats=quantization().floats))
    assert pictures(render_html(only)) == []
    assert len(pictures(render_html(Report("m", trades=[Trade(10, 0.5)])))) == 1


@pytest.mark.parametrize(
    ("cosine", "words"),
    [(1.0, "1.000"), (0.99996, "0.99996"), (0.9984, "0.998"), (-0.2, "-0.200"), (None, "")],
)
def test_cosines_tell_themselves_from_one(cosine: float | None, words: str) -> None:
    assert cosine_text(cosine) == words


def test_axes_of_one_value_have_room() -> None:
    assert isinstance(linear("x", [3.0], least=10.0), Axis)
    axis = linear("x", [3.0], least=10.0)
    assert axis.high - axis.low >= 10 and 0.3 < axis.at(3.0) < 0.7
