"""The page of architectures lists the whole zoo, and nothing on it differs from its original."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from models import cnn, huggingface, sweep
from models.entry import Entry
from models.sweep import check
from models.sweep_check import Row, difference
from models.sweep_page import page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
ROW = re.compile(r"^\| ([\w.-]+) \| ([\w-]+) \| (eval|train) \|", re.MULTILINE)
ENTRIES = [*huggingface.ENTRIES.values(), *cnn.ENTRIES.values()]


def test_every_model_of_the_zoo_is_listed_in_both_modes() -> None:
    listed = set(ROW.findall(PAGE.read_text()))
    assert listed == {(e.name, e.family, mode) for e in ENTRIES for mode in ("eval", "train")}


def test_nothing_listed_differs_from_its_original() -> None:
    text = PAGE.read_text()
    assert "differs" not in text.partition("## Hugging Face")[2]
    assert text.count("Different from the original: none") == 2


def test_at_least_forty_architectures_are_optimized_in_both_modes() -> None:
    found = re.search(
        r"(\d+) are optimized and equal .* (\d+) in\s+training mode", PAGE.read_text()
    )
    assert found and min(map(int, found.groups())) >= 40


def _bert() -> Entry:
    return huggingface.ENTRIES["bert"]


def test_a_row_is_made_as_the_page_shows_it() -> None:
    row = check(_bert(), training=True)
    assert row.captured and not row.wrong and row.axes == ("batch", "seq")
    assert row.forward < 1e-5 and row.gradient is not None and 0 < row.gradient < 1e-4
    assert "| bert | encoder | train | batch, seq |" in page([row])


def test_a_wrong_row_is_marked() -> None:
    row = Row("bert", "encoder", "eval", captured=True, forward=0.5, wrong="batch 1")
    assert "**differs at batch 1**" in page([row])


def test_the_difference_sees_one_percent() -> None:
    import torch

    theirs = {"w": torch.randn(5, 5), "key.bias": 1e-9 * torch.randn(5)}
    ours = {**theirs, "key.bias": 1e-9 * torch.randn(5)}
    assert difference(ours, theirs, 1e-3) < 1e-5
    assert difference({**ours, "w": theirs["w"] * 1.01}, theirs, 1e-3) > 5e-3
    assert difference({"w": theirs["w"]}, theirs, 1e-3) == float("inf")
    nan = {"w": torch.full((3,), float("nan"))}
    assert difference(nan, nan) == 0.0
    assert not difference(nan, {"w": torch.ones(3)}) <= 1.0


def test_a_sweep_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[sweep.Job] = [("encoder", name, False, True) for name in ("bert", "esm")]
    row = Row("bert", "encoder", "eval", True, ("batch",), ("another size",), applied={"A": 2})
    kept = tmp_path / "rows.jsonl"
    with sweep._Kept(kept) as first:
        first.add(jobs[0], [row])
    monkeypatch.setattr(sweep, "_job", None)  # nothing is left to run
    with sweep._Kept(kept) as again:
        assert list(sweep._rows(jobs[:1], 1, again)) == [row]
        again.add(jobs[1], [row])
    with sweep._Kept(kept) as both:
        assert list(both.known) == jobs
    with sweep._Kept(None) as none:
        none.add(jobs[0], [row])
        assert none.known == {jobs[0]: [row]}
