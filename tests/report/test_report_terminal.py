"""The report in the terminal: plain where it is no terminal, and never misled by what it prints."""

from __future__ import annotations

import io
import re

import pytest
from report_samples import applied, certificate, deep_report, missed, small_report, summary
from rich.console import Console

from graphopt.report import Report
from graphopt.report.terminal import print_report

BOX = re.compile("[\u2500-\u257f\u2580-\u259f]")


def shown(report: Report, *, terminal: bool = False, width: int = 60, verbose: bool = False) -> str:
    console = Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=width,
        color_system="truecolor" if terminal else None,
        legacy_windows=False,
    )
    print_report(report, console, verbose)
    return console.file.getvalue()


@pytest.mark.parametrize("verbose", [False, True])
def test_output_that_is_no_terminal_is_plain(verbose: bool) -> None:
    text = shown(small_report(), verbose=verbose)
    assert "\x1b" not in text
    assert not BOX.search(text)
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_plain_paths_are_not_wrapped() -> None:
    path = "/a/" + "very/" * 40 + "long.py:7"
    text = shown(Report("m", missed=[missed(source=path)]), width=40)
    assert any(path in line for line in text.splitlines())


def test_a_terminal_gets_colours_and_tables() -> None:
    text = shown(small_report(), terminal=True, width=120)
    assert "\x1b[" in text
    assert BOX.search(text)


NAMES = ("EliminateCommonSubexpressions", "MergeSiblingProjections", "RecognizeComposites")


@pytest.mark.parametrize("width", [50, 60, 80, 100, 140])
def test_a_narrow_terminal_breaks_no_name(width: int) -> None:
    report = Report(
        "m",
        passes=[summary(name) for name in NAMES],
        applied=[applied(name, ("a", "b"), ("c",)) for name in NAMES],
        whole=[certificate("whole program")],
    )
    text = re.sub(r"\x1b\[[\d;]*m", "", shown(report, terminal=True, width=width))
    assert all(text.count(name) == 3 for name in NAMES)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("300 -> 240") == 1 + len(NAMES)
    assert text.count("2 -> 1") == len(NAMES)
    assert ("matched 24, kept 20, 4 slower;" in text) == (width < 100)


def test_what_a_pass_did_is_said_in_one_line() -> None:
    text = shown(small_report())
    assert "matched 24, kept 20, 4 slower" in text
    assert "matched 24, kept 19, 4 slower, 1 rolled back" in text
    assert "matched 48, kept 39, 8 slower, 1 rolled back; 3 candidates were refused" in text


def test_applied_rewrites_are_grouped_with_their_worst_certificate() -> None:
    rows = [
        applied("FuseNorm", ("a", "b"), ("c",), speedup=2.0),
        applied("FuseNorm", ("d", "e"), ("f",), speedup=0.5, certificate=certificate(error=3.9e-7)),
    ]
    line = next(x for x in shown(Report("m", applied=rows)).splitlines() if "FuseNormPass" in x)
    assert re.search(r"FuseNorm +FuseNormPass +2 +4 -> 2 +1\.00x +reassociated", line)
    assert "error 3.9e-07, allowed 4e-07" in line


def test_a_certificate_over_its_bound_is_the_worst() -> None:
    rows = [
        applied("R", ("a",), ("b",), certificate=certificate(error=9e-7, bound=1.0)),
        applied("R", ("c",), ("d",), certificate=certificate(error=2e-9, bound=1e-9)),
        applied("R", ("e",), ("f",), certificate=certificate(error=0.0, bound=0.0)),
    ]
    assert "error 2e-09, allowed 1e-09" in shown(Report("m", applied=rows))


def test_misses_that_differ_in_the_copy_are_one() -> None:
    text = shown(deep_report(12))
    assert text.count("FuseGelu does not apply") == 1
    assert "12 times, first at node gelu_0" in text
    assert "allowed by: Attention approximate=True" in text


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("match", "looks alike"),
        ("check", "does not apply"),
        ("verify", "did not verify"),
        ("profit", "does not pay on this machine"),
    ],
)
def test_each_stage_has_its_words(stage: str, words: str) -> None:
    assert words in shown(Report("m", missed=[missed(stage=stage)]))


def test_profit_is_allowed_by_an_option_of_the_run_not_of_the_pass() -> None:
    text = shown(Report("m", missed=[missed(stage="profit", option="measure=False")]))
    assert "allowed by: measure=False" in text


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (Report("m", verified=True), "m: verified"),
        (Report("m", whole=[certificate()]), "m: NOT VERIFIED"),
        (Report("m"), "m: not verified: the whole was not compared"),
    ],
)
def test_the_header_says_whether_it_verified(report: Report, words: str) -> None:
    assert shown(report).splitlines()[0] == words


def test_an_empty_report_says_that_nothing_ran() -> None:
    assert "no pass ran" in shown(Report("m"))


def test_sizes_seconds_and_notes_are_shown() -> None:
    text = shown(small_report())
    assert "nodes 300 -> 240" in text
    assert "85.8 MiB -> 84.9 MiB" in text
    assert "took 4.75 s (capture 1.5 s, optimize 3.25 s)" in text
    assert "quality 0.91 before, 0.91 after" in text


def test_verbose_lists_every_rewrite_and_miss() -> None:
    brief, full = shown(deep_report(3)), shown(deep_report(3), verbose=True)
    for name in ("softmax_0", "softmax_1", "softmax_2", "sdpa_2"):
        assert name not in brief
        assert name in full
    assert "torch 2.13.0" in full


HOSTILE = "\x1b]0;owned\x07\x1b[2Jx\r[bold]y[/] \u202e:smile:\nz"


@pytest.mark.parametrize("terminal", [False, True])
def test_names_cannot_steer_the_terminal(terminal: bool) -> None:
    report = Report(
        HOSTILE,
        missed=[missed(HOSTILE, reason=HOSTILE, node=HOSTILE, source=HOSTILE)],
        applied=[applied(HOSTILE, (HOSTILE,), (HOSTILE,))],
        passes=[summary(HOSTILE)],
        notes=[HOSTILE],
    )
    text = shown(report, terminal=terminal, width=400, verbose=True)
    text = re.sub(r"\x1b\[[\d;]*m", "", text) if terminal else text
    assert not set("\x1b\x07\r\u202e") & set(text)
    assert "[bold]y[/]" in text
    assert ":smile:" in text
    assert r"\x1b" in text


def test_report_print_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    small_report().print()
    assert "Encoder: verified" in capsys.readouterr().out
