"""The HTML report in a real browser: it starts without errors and shows what its address says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_samples import deep_report, node, small_report
from test_report_html import page, renamed

from graphopt.report import Report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1100",
    "--virtual-time-budget=2000",
    "--dump-dom",
)

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")


def opened(report: Report, address: str, folder: Path) -> str:
    """The page's elements once its script has run; fails on any script error."""
    file = folder / "report.html"
    report.to_html(file)
    command = [
        str(BROWSER),
        *FLAGS,
        f"--user-data-dir={folder / 'profile'}",
        f"{file.as_uri()}{address}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    root = re.search(r"<html[^>]*>", done.stdout)
    assert root, done.stderr
    assert "data-error" not in root[0]
    assert 'data-ready="true"' in root[0]
    assert "data-pwned" not in root[0]
    return done.stdout


def shapes(dom: str, side: str) -> dict[str, str]:
    """Titles of the shapes that one graph shows, with their classes."""
    pane = dom.partition(f'data-pane="{side}"')[2].partition("</figure>")[0]
    found = re.findall(r'<g class="([^"]*)"[^>]*>(?:(?!<g ).)*?class="title">(.*?)</text>', pane)
    return {re.sub(r"<[^>]*>", "", title): kinds for kinds, title in found}


@pytest.mark.parametrize("address", ["", "#graph&open=*", "#missed"])
def test_hostile_names_run_nothing(address: str, tmp_path: Path) -> None:
    report = renamed(small_report())
    assert "pwned" in page(report).text
    dom = opened(report, address, tmp_path)
    assert "<img" not in dom


def test_an_empty_report_opens_at_its_graphs(tmp_path: Path) -> None:
    assert "This report holds no graph." in opened(Report("empty"), "#graph", tmp_path)


def test_a_search_unfolds_and_marks_what_it_finds(tmp_path: Path) -> None:
    dom = opened(deep_report(8, odd=2), "#graph&open=-&search=softmax_5", tmp_path)
    before, after = shapes(dom, "before"), shapes(dom, "after")
    assert before["softmax_5"] == "node removed selected found"
    assert before["matmul_5"] == "node removed kin"
    assert after["scaled_dot_product_attention sdpa_5"] == "node added kin"
    assert "layer.4" not in " ".join(k for k, v in before.items() if v.startswith("open"))
    assert "1 of 1" in dom


def test_the_address_chooses_side_and_open_boxes(tmp_path: Path) -> None:
    dom = opened(deep_report(8), "#graph&side=after&open=encoder.layer.0.attention", tmp_path)
    after = shapes(dom, "after")
    assert after["self"] == "box"
    assert after["attention"] == "open"
    assert after["layer.1"] == "box"
    assert not any("selected" in kinds for kinds in after.values())
    assert re.search(r'data-pane="before"[^>]*hidden', dom)


def test_tables_are_filtered_by_the_address(tmp_path: Path) -> None:
    dom = opened(small_report(), "#missed&rule=FuseAttention&search=add_1", tmp_path)
    table = dom.partition('id="missed"')[2].partition("</section>")[0]
    rows = re.findall(r"<tr[^>]*data-outcome[^>]*>", table)
    assert len(rows) == 5
    assert sum("hidden" not in row for row in rows) == 1
    assert "1 of 5 rows" in table


def extent(dom: str, side: str) -> tuple[float, float]:
    """Where on the screen the graph of one side starts and ends, in pixels from its pane's left."""
    pane = dom.partition(f'data-pane="{side}"')[2].partition("</figure>")[0]
    move = re.search(r"translate\(([-\d.]+) [-\d.]+\) scale\(([\d.]+)\)", pane)
    assert move
    shift, scale = map(float, move.groups())
    places = re.findall(
        r'translate\(([-\d.]+) [-\d.]+\)"><rect class="frame" width="([\d.]+)"', pane
    )
    spans = [(float(x), float(x) + float(width)) for x, width in places]
    return shift + scale * min(a for a, _ in spans), shift + scale * max(b for _, b in spans)


@pytest.mark.parametrize("inputs", [6, 12, 24])
def test_no_side_is_cut_off_while_the_other_is_empty(inputs: int, tmp_path: Path) -> None:
    names = [f"a_rather_long_name_{i}" for i in range(inputs)]
    made = [node(f"sum_{i}", "aten.add", (names[i], names[-1])) for i in range(inputs - 1)]
    late = node("late", "aten.neg", (names[-1],))
    graph = [node(names[-1], "input", ()), late]
    graph += [node(name, "input", ()) for name in names[:-1]]
    graph += [*made, node("output", "output", ("late", *(m.name for m in made)))]
    report = Report("wide", graph_before=graph, graph_after=graph)
    dom = opened(report, "#graph", tmp_path)
    pane = (1600 - 320) / 2
    for side in ("before", "after"):
        left, right = extent(dom, side)
        assert left >= 0 or right >= pane - 40
        assert right <= pane or left <= 40
