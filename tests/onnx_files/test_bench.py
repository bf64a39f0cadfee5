"""``graphopt bench MODEL.onnx``: times of both files, and where ONNX Runtime spends them."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from graphs import model, node, save, tensor, value, weights

from graphopt.cli import main
from graphopt.onnx_files.bench import bench_onnx
from graphopt.onnx_files.profile import _profile
from graphopt.onnx_files.profile_page import MOST, render_profile

BODY = 4


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A perceptron, and a loop of which each turn adds its input."""
    import onnx
    from graphs import FLOAT, graph
    from onnx import TensorProto

    inner = graph(
        [node("Tanh", ["s"], ["t"], name="tanh"), node("Identity", ["c"], ["d"])],
        [
            value("i", [], TensorProto.INT64),
            value("c", [], TensorProto.BOOL),
            value("s", None),
        ],
        [value("d", [], TensorProto.BOOL), value("t", None, FLOAT)],
    )
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="a <b>"),
        node("Loop", ["count", "yes", "h"], ["l"], name="loop", body=inner),
        node("MatMul", ["l", "w"], ["y"], name="second"),
    ]
    held = [
        tensor(weights(64, 64), "w"),
        tensor(np.array(BODY), "count"),
        tensor(np.array(True), "yes"),
    ]
    made = model(nodes, [value("x", ["n", 64])], [value("y", ["n", 64])], held)
    onnx.checker.check_model(made)
    monkeypatch.chdir(tmp_path)
    return save(made, tmp_path / "m.onnx")


def test_times_and_profile_of_both_files(source):
    found = bench_onnx(source, rounds=3)
    assert [row.name for row in found.rows] == ["original", "optimized"]
    assert all(0 < r.fastest <= r.median <= r.slowest for r in found.rows)
    assert found.rows[0].speedup == 1 and found.rows[0].bytes == source.stat().st_size
    profile = found.profiles["original"]
    held = {row.operator: row for row in profile.operators}
    assert held["MatMul"].count == 2 and held["Tanh"].count == 1
    assert sum(row.share for row in profile.operators) == pytest.approx(1)
    assert [r.seconds for r in profile.operators] == sorted(r.seconds for r in profile.operators)[
        ::-1
    ]
    assert {n.name for n in profile.slowest} >= {"a <b>", "second"}
    assert any("float[2,64]".replace(",", ", ") in n.shapes for n in profile.slowest)


def test_a_trace_becomes_times_of_one_run():
    """The first run is left out; what runs twice in a run counts twice."""

    def event(name, operator, duration, category="Node"):
        arguments = {"op_name": operator, "output_type_shape": [{"float": [2, 3]}]}
        return {"cat": category, "name": name, "dur": duration, "args": arguments}

    first = [event("a_kernel_time", "A", 999), *[event("b_kernel_time", "B", 999)] * 2]
    later = [event("a_kernel_time", "A", 10), *[event("b_kernel_time", "B", 15)] * 2]
    rest = [event("a_fence_before", "A", 5), event("session", "", 5, "Session")]
    found = _profile([*rest, *first, *later, *later], runs=2)
    assert found.seconds == pytest.approx(40e-6)
    assert [(o.operator, o.count) for o in found.operators] == [("B", 1), ("A", 1)]
    assert found.operators[0].share == pytest.approx(0.75)
    assert found.slowest[1].shapes == "float[2, 3]"


class Tags(HTMLParser):
    """Counts elements, and sees that each that opens closes."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_has_a_bar_for_each_operator(source):
    found = bench_onnx(source, rounds=3)
    page = render_profile(found)
    parsed = Tags()
    parsed.feed(page)
    assert not parsed.open and "a &lt;b&gt;" in page and "a <b>" not in page
    drawn = [a for t, a in parsed.seen if t == "rect" and a["class"] == "after"]
    assert len(drawn) == sum(min(len(p.operators), MOST) for p in found.profiles.values())
    widths = [float(a["width"]) for a in drawn[: len(found.profiles["original"].operators)]]
    assert widths == sorted(widths, reverse=True) and widths[0] > 300
    assert not {"script", "link", "img"} & {t for t, _ in parsed.seen} and "http:" not in page


def call(capsys, *arguments):
    status = 0
    try:
        main([str(a) for a in arguments])
    except SystemExit as leave:
        status = leave.code or 0
    out, err = capsys.readouterr()
    return status, out, err


def test_the_verb_prints_and_writes(source, tmp_path, capsys):
    arguments = ("bench", "m.onnx", "--rounds", "3", "--no-measure")
    status, out, _ = call(capsys, *arguments, "-o", "p.html", "-o", "p.json")
    assert status == 0 and "MatMul" in out and "vs original" in out
    held = json.loads((tmp_path / "p.json").read_text())
    assert held["profiles"]["original"]["operators"][0]["operator"]
    assert (tmp_path / "p.html").read_text().startswith("<!doctype html>")
    status, out, _ = call(capsys, *arguments, "--json", "--inputs", "x:float32[n=5,64]")
    facts = json.loads(out)
    assert facts["shapes"] == {"x": "[5, 64]"} and len(facts["rows"]) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "p.html", "p.json"}


@pytest.mark.parametrize(
    "options",
    [
        *(["--no-inductor"], ["--inductor"], ["--onnx"], ["--no-ablation"], ["--train"]),
        *(["--arch", "a:b"], ["--trust-pickle"], ["--dequantize"]),
    ],
    ids=lambda options: options[0],
)
def test_options_that_mean_nothing_are_refused(options, source, capsys):
    status, _, err = call(capsys, "bench", "m.onnx", *options)
    assert status == 1 and "means nothing to `graphopt bench` for an ONNX file" in err


def test_other_refusals(source, tmp_path, capsys):
    status, _, err = call(capsys, "bench", "m.onnx", "-o", "p.txt")
    assert status == 1 and "cannot write a file that ends in .txt" in err
    status, _, err = call(capsys, "bench", "m.onnx", "-o", "missing/p.html")
    assert status == 1 and "folder does not exist" in err
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx"}
