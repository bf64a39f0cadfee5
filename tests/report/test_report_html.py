"""The HTML report: self-contained, escaped, complete without scripts, small and quick."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import counted
from report_samples import deep_report, small_report, summary

from graphopt.capture import capture
from graphopt.report import Report
from graphopt.report.html import SCRIPTS, render_html
from graphopt.report.markup import join, prose, script_data, tag
from graphopt.report.views import node_views

PAYLOAD = (
    "\"'></title></style></script><script>document.documentElement.dataset.pwned='1'</script>"
    "<img src=x onerror=\"document.documentElement.dataset.pwned='2'\">"
    "<!-- ]]> &lt; ${script} {{7*7}} javascript:alert(1) \u2028 \x00"
)
LOADERS = r"\bfetch\(|XMLHttpRequest|import\(|importScripts|WebSocket|eval\(|innerHTML|Function\("


class Page(HTMLParser):
    """Elements, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        kinds = {"script": self.scripts, "style": self.styles}
        kinds.get(self.inside, self.words).append(data)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[0])

    @property
    def policy(self) -> str:
        metas = [m for m in self.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
        return metas[0]["content"] or ""


def page(report: Report) -> Page:
    return Page(render_html(report))


def poisoned(value: Any, payload: str = PAYLOAD) -> Any:
    """The same data with every string (and key of a free-form dict) replaced by the payload."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: poisoned(getattr(value, f.name), payload) for f in dataclasses.fields(value)
        }
        return type(value)(**fields)
    if isinstance(value, dict):
        return {f"{payload}{i}": poisoned(v, payload) for i, v in enumerate(value.values())}
    if isinstance(value, list | tuple):
        return type(value)(poisoned(v, payload) for v in value)
    return payload if isinstance(value, str) else value


def renamed(report: Report) -> Report:
    """Poisoned, but node names stay distinct, so that the graphs keep their edges."""
    views = {v.name for v in (*report.graph_before, *report.graph_after)}
    text = json.dumps(poisoned(report).to_dict())
    assert text.count("pwned") > 100
    poisonous = poisoned(report)
    for name in ("graph_before", "graph_after"):
        rows = [
            dataclasses.replace(
                bad,
                name=good.name + PAYLOAD,
                inputs=tuple(n + PAYLOAD for n in good.inputs if n in views),
                module=".".join(part + PAYLOAD for part in good.module.split(".")),
                op=good.op if good.op == "parameter" else PAYLOAD,
            )
            for good, bad in zip(getattr(report, name), getattr(poisonous, name), strict=True)
        ]
        setattr(poisonous, name, rows)
    return poisonous


@pytest.fixture(scope="module")
def hostile() -> Page:
    return page(renamed(small_report()))


def skeleton(found: Page) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, tuple(attributes)) for name, attributes in found.elements]


def test_names_make_no_elements(hostile: Page) -> None:
    """What a hostile report says changes texts, never the structure."""
    harmless = page(poisoned(small_report(), "x"))
    for_text = {("code", ()), ("wbr", ())}
    assert set(skeleton(hostile)) <= set(skeleton(harmless)) | for_text
    assert len(hostile.all("script")) == 2
    assert not hostile.all("img")


def test_names_make_no_attributes(hostile: Page) -> None:
    for _, attributes in hostile.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "src"]


def test_names_are_shown_as_they_are(hostile: Page) -> None:
    text = "".join(hostile.words)
    assert "<img src=x" in text
    assert "${script}" in text


def test_the_title_is_escaped(hostile: Page) -> None:
    """One of the page, and one of each picture and of each of its marks."""
    titles = [name for name, _ in hostile.elements].count("title")
    assert titles == [name for name, _ in page(small_report()).elements].count("title")


def test_data_cannot_close_its_block(hostile: Page) -> None:
    block = hostile.text.partition('id="graph-data">')[2].partition("</script>")[0]
    assert not set("<>&\u2028") & set(block)
    names = [row[0] for row in hostile.data["before"]["nodes"]]
    assert "mean" + PAYLOAD in names


def test_links_lead_only_into_the_page(hostile: Page) -> None:
    links = hostile.all("a")
    assert links
    for link in links:
        assert re.fullmatch(r"#(\w+)(&(node|rule)=[\w%.~-]+)?", link["href"] or "")


@pytest.mark.parametrize("report", [Report("empty"), small_report(), deep_report(2)])
def test_nothing_is_loaded(report: Report) -> None:
    found = page(report)
    tags = {name for name, _ in found.elements}
    assert not tags & {"link", "iframe", "img", "object", "embed", "base", "form", "video", "audio"}
    for _, attributes in found.elements:
        assert not {"src", "srcset", "action", "background", "poster"} & attributes.keys()
    assert not re.search(r"@import|url\(", "".join(found.styles))
    assert not re.search(LOADERS, "".join(found.scripts))
    places = set(re.findall(r"https?://[^\s\"'<]+", found.text))
    assert places == {"http://www.w3.org/2000/svg"}


def test_the_policy_allows_only_the_page_s_own_script() -> None:
    found = page(small_report())
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in found.policy
    assert found.policy.startswith("default-src 'none'; ")
    assert "style-src 'unsafe-inline'" in found.policy
    assert found.elements.index(("style", {})) > next(
        i for i, (name, a) in enumerate(found.elements) if a.get("content") == found.policy
    )


def test_the_script_does_not_close_itself() -> None:
    assert len(SCRIPTS) == len(set(SCRIPTS))
    script = page(Report("m")).scripts[1]
    assert "</script" not in script.lower()
    assert "<!--" not in script
    assert script.rstrip().endswith("Page.start();")


def test_an_empty_report_is_a_page() -> None:
    text = "".join(page(Report("empty")).words)
    for words in ("No pass ran.", "Nothing was rewritten.", "No candidate was left alone."):
        assert words in text
    assert "not verified" in text


def test_everything_reads_without_scripts() -> None:
    text = " ".join("".join(page(small_report()).words).split())
    for words in (
        "kept 39 of 48 matched",
        "85.8 MiB → 84.9 MiB",
        "the mask is added after softmax_2",
        "approximate=True",
        "/home/user/project/model.py:40",
        "FuseNorm",
        "1.40x",
        "error 1.5e-07, allowed 4e-07",
        "quality 0.91 before, 0.91 after",
        "torch 2.13.0",
        '"chunk": 4',
    ):
        assert words.replace(" ", "") in text.replace(" ", ""), words


def test_every_rewrite_and_miss_has_its_row() -> None:
    report = deep_report(30, odd=4)
    rows = page(report).all("tr")
    assert sum("data-outcome" in row for row in rows) == len(report.missed)
    filtered = [row for row in rows if row.get("data-rule") and "data-outcome" not in row]
    assert len(filtered) == 2 * len(report.applied)  # the rewrite and its certificate


def test_long_lists_of_nodes_are_cut_with_the_rest_in_the_title() -> None:
    report = small_report()
    names = tuple(f"n{i}" for i in range(9))
    report.applied = [dataclasses.replace(report.applied[0], removed=names)]
    assert {"title": "n6, n7, n8", "class": "faint"} in page(report).all("span")


def test_a_certificate_over_its_bound_fills_the_bar() -> None:
    report = small_report()
    report.whole = [dataclasses.replace(report.whole[0], error=float("inf"))]
    found = page(report)
    assert {"class": "meter over", "title": "not within any bound"} in found.all("span")


def test_two_thousand_nodes_are_small_and_quick() -> None:
    deep, half = deep_report(52, odd=20), deep_report(26, odd=20)
    assert len(deep.graph_before) > 2000
    _, few = counted(lambda: render_html(half))
    text, calls = counted(lambda: render_html(deep))
    assert calls < 3 * few
    assert len(text.encode()) < 3_000_000


def test_to_html_writes_the_file(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    assert small_report().to_html(file) == file
    assert file.read_text(encoding="utf-8") == small_report().to_html()


def test_markup_escapes_text_and_attributes() -> None:
    made = tag("a", "<b>", tag("i", "&"), title='"<', data_x="1", hidden=True, class_=None)
    assert made == '<a title="&quot;&lt;" data-x="1" hidden>&lt;b&gt;<i>&amp;</i></a>'
    assert join("a", "<") == "a&lt;"


def test_prose_marks_names() -> None:
    assert prose("`a<b` reads c") == "<code>a&lt;b</code> reads c"
    assert prose("an odd ` tick <") == "an odd ` tick &lt;"


def test_script_data_is_the_same_data() -> None:
    data = {"a": ["</script>", "\u2028", "&", "é", None, 1.5]}
    block = script_data("x", data)
    assert json.loads(block.partition(">")[2].removesuffix("</script>")) == data


def test_notes_show_names_as_code() -> None:
    assert "<li>axis 1 (<code>seq</code>)</li>" in render_html(
        Report("m", notes=["axis 1 (`seq`)"])
    )


def test_both_counts_of_nodes_are_of_operators() -> None:
    views = node_views(capture(torch.nn.Linear(3, 3).eval(), (torch.ones(2, 3),)))
    report = Report("m", graph_before=views, graph_after=views)
    report.passes = [summary(nodes_before=1, nodes_after=1)]
    text = render_html(report)
    assert "graphs of 1 node before and 1 node after (calls of operators)" in text
    assert "unchanged, calls of operators" in text
