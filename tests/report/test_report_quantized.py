"""Quantization in the terminal: a summary in few lines, every weight where it is asked for."""

from __future__ import annotations

import dataclasses

import pytest
from report_samples import layer, quantization, small_report
from test_report_terminal import shown

from graphopt.report import Quantization, QuantizedLayer, Report, Trade
from graphopt.report.quantized_text import format_text
from graphopt.report.terminal import explain_lines


def report(*layers: QuantizedLayer, **changes: object) -> Report:
    found = dataclasses.replace(quantization(), layers=layers, **changes)
    return Report("m", quantization=found, verified=True)


def test_a_summary_in_place_of_a_line_per_weight() -> None:
    rows = [layer(f"h.{i}.weight", error=0.01 * i, sqnr=40.0 - i) for i in range(1, 40)]
    eight = {"bits": 8, "group_size": None, "symmetric": True, "activations": "dynamic"}
    text = shown(report(*rows, layer("head.weight", **eight, sqnr=50.0, error=0.003)))
    lines = [line.strip() for line in text.splitlines()]
    start = lines.index("Quantization")
    part = lines[start + 1 :]
    assert part[:5] == [
        "40 weights in few bits, 1 left in floats (12.5 KiB); the model 29.3 KiB -> 15.6 KiB",
        "lowest SQNR 1.0 dB, of h.39.weight, on calibration inputs",
        "output logits: SQNR 26.0 dB, cosine 0.999, KL divergence 0.013 nats",
        "output state: SQNR exact, cosine 1.000",
        "one run, operator by operator: 40 ms -> 20 ms",
    ]
    table = [line.split("  ") for line in part[5:]]
    cells = [[cell.strip() for cell in row if cell] for row in table]
    assert cells == [
        ["format", "weights", "size", "lowest SQNR", "of"],
        ["int4 in groups of 32 with zero points", "39", "312 KiB -> 48.8 KiB", "1.0 dB",
         "h.39.weight"],
        ["int8 per channel, activations int8", "1", "8 KiB -> 1.25 KiB", "50.0 dB", "head.weight"],
    ]  # fmt: skip


def test_every_weight_stands_in_the_long_report() -> None:
    rows = [layer(f"h.{i}.weight") for i in range(30)]
    short, long = (shown(report(*rows), verbose=v, width=200) for v in (False, True))
    assert sum(f"h.{i}.weight" in short for i in range(30)) < 3
    assert all(f"h.{i}.weight" in long for i in range(30))


def test_remarks_of_one_kind_are_one_line() -> None:
    rows = [
        layer(f"h.{i}.weight", note=f"beside it {i} columns; `h.{i}` is rounded") for i in (3, 4)
    ]
    rows.append(layer("x.weight", note="beside it 9 columns"))
    text = shown(report(*rows))
    assert "3 weights, the first h.3.weight: beside it 3 columns\n" in text
    assert "2 weights, the first h.3.weight: `h.3` is rounded\n" in text


def test_exact_and_unmeasured_layers() -> None:
    assert " exact" in shown(report(layer(error=0.0, sqnr=None)))
    text = shown(report(layer(error=None, sqnr=None, cosine=None)))
    assert "not measured" in text and "lowest SQNR 2" not in text


def test_a_search_is_one_line() -> None:
    trades = [Trade(1024, 0.5), Trade(2048, 0.25, 0.9, chosen=True)]
    line = "search for bits: 2 sets of formats looked at"
    assert f"{line}; chosen: 2 KiB, estimated loss 0.25, quality 0.9\n" in shown(
        Report("m", trades=trades)
    )
    assert f"{line}, none chosen\n" in shown(Report("m", trades=[trades[0]] * 2))


def test_without_quantization_there_is_no_section() -> None:
    assert "Quantization" not in shown(Report("m"))


def test_explain_answers_for_a_weight() -> None:
    found = small_report()
    layers = (layer("norm.weight"),)
    found.quantization = Quantization(layers=layers)
    lines = explain_lines(found, "norm.weight")
    assert lines[0] == (
        "norm.weight is stored as int4 in groups of 32 with zero points, 8 KiB -> 1.25 KiB: "
        "SQNR 20.0 dB, cosine 0.995."
    )
    assert any("lowest SQNR 20.0 dB, of norm.weight" in line for line in explain_lines(found))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 3, "group_size": None, "symmetric": True}, "int3 per channel"),
        ({"dtype": "fp8", "bits": 8, "group_size": None, "symmetric": True,
          "activations": "dynamic"}, "fp8 per channel, activations fp8"),
        ({"dtype": "nvfp4", "group_size": 16, "symmetric": True}, "nvfp4 in groups of 16"),
        ({"bytes_beside": 3}, "int4 in groups of 32 with zero points, floats beside"),
    ],
)  # fmt: skip
def test_formats_in_words(changes: dict[str, object], words: str) -> None:
    assert format_text(layer(**changes)) == words
