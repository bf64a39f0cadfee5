"""Figures and places in words, the same in every view of a report."""

from __future__ import annotations

import math
import re
import unicodedata
from pathlib import Path

from graphopt.report.groups import Totals
from graphopt.report.model import Certificate, PassSummary, Report

_PACKAGES = re.compile(r"^.*[\\/](?:site|dist)-packages[\\/]")


def seconds_text(seconds: float) -> str:
    """``850 us``, ``12 ms``, ``3.4 s``, ``2 min 5 s``."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{seconds * 1e6:.0f} us" if seconds else "0 s"


def bytes_text(size: int) -> str:
    """``512 B``, ``1.5 MiB``: powers of 1024."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{size} B" if units[0] == "B" else f"{_three_digits(value)} {units[0]}"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def error_text(error: float | None) -> str:
    """``3.1e-07``; ``0`` for none; ``unknown`` where a file had no figure."""
    if error is None or math.isnan(error):
        return "unknown"
    return f"{error:.2g}"


def speedup_text(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x"


def change_text(before: int, after: int) -> str:
    return f"{before} -> {after}"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def outcome_text(summary: PassSummary | Totals) -> str:
    """``matched 24, kept 20, 4 slower``, of one pass or of all."""
    words = [f"matched {summary.matched}", f"kept {summary.kept}"]
    if summary.slower:
        words.append(f"{summary.slower} slower")
    if summary.rolled_back:
        words.append(f"{summary.rolled_back} rolled back")
    return ", ".join(words)


def certificate_text(certificate: Certificate) -> str:
    """The error that was measured against what was allowed, gradients included."""
    text = _against(certificate.error, certificate.bound)
    if certificate.gradient_error is None or certificate.gradient_bound is None:
        return text
    text = f"{text}, gradients {_against(certificate.gradient_error, certificate.gradient_bound)}"
    return ", ".join(filter(None, (text, share_text(certificate.gradient_share))))


def share_text(share: float | None) -> str:
    """How much of the gradient products a filter kept."""
    return "" if share is None else f"{share:.1%} of the gradient products kept"


def _against(error: float, bound: float) -> str:
    if error == 0 and bound == 0:
        return "equal bits"
    return f"error {error_text(error)}, allowed {error_text(bound)}"


def verdict_text(report: Report) -> str:
    """Whether the whole was held to the original, and the result."""
    if report.verified:
        return "verified"
    return "NOT VERIFIED" if report.whole else "not verified: the whole was not compared"


def short_source(source: str | None) -> str:
    """A ``file:line`` as a person would say it: relative to the package or working folder."""
    if not source:
        return ""
    if _PACKAGES.match(source):
        return _PACKAGES.sub("", source)
    try:
        return source.removeprefix(f"{Path.cwd()}/")
    except FileNotFoundError:  # the working folder is gone
        return source


def printable(text: str) -> str:
    """``text`` on one line, with control characters (terminal escapes among them) spelled out."""
    return "".join(_visible(c) for c in text)


def _visible(character: str) -> str:
    if character in "\n\t":
        return " "
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return character.encode("unicode_escape").decode() if hidden else character
