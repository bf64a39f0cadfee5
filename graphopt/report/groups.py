"""The questions every view of a report asks: what applied, by rule; what was missed, by reason."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from graphopt.report.changes import STATE
from graphopt.report.model import Applied, Certificate, MissedRewrite, NodeView, Report

T = TypeVar("T")

_COPY = re.compile(r"`([^`]*?)_\d+`")
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")

STAGES = {
    "match": "looked alike",
    "check": "refused",
    "verify": "rolled back",
    "profit": "slower here",
}
"""What the stage of a missed rewrite means, in two words."""


@dataclass(frozen=True)
class AppliedRule:
    """All rewrites of one rule that were kept."""

    pass_name: str
    rule: str
    rewrites: tuple[Applied, ...]

    @property
    def removed(self) -> int:
        return sum(len(r.removed) for r in self.rewrites)

    @property
    def added(self) -> int:
        return sum(len(r.added) for r in self.rewrites)

    @property
    def speedup(self) -> float | None:
        """Geometric mean of the measured speedups; ``None`` where none was measured."""
        known = [r.speedup for r in self.rewrites if r.speedup and math.isfinite(r.speedup)]
        return statistics.geometric_mean(known) if known else None

    @property
    def worst(self) -> Certificate:
        """The certificate closest to its bound, or furthest over it."""
        return max((r.certificate for r in self.rewrites), key=strain)


@dataclass(frozen=True)
class MissedReason:
    """Candidates that one rule left alone for one reason."""

    rewrites: tuple[MissedRewrite, ...]

    @property
    def first(self) -> MissedRewrite:
        return self.rewrites[0]

    @property
    def source(self) -> str | None:
        """The first source line that is known."""
        return next((m.source for m in self.rewrites if m.source), None)

    @property
    def option(self) -> str | None:
        return next((m.option for m in self.rewrites if m.option), None)


def applied_rules(report: Report) -> list[AppliedRule]:
    """Kept rewrites grouped by pass and rule, in order of first appearance."""
    groups = _grouped(report.applied, lambda a: (a.pass_name, a.rule))
    return [AppliedRule(rows[0].pass_name, rows[0].rule, tuple(rows)) for rows in groups]


def missed_reasons(missed: Iterable[MissedRewrite]) -> list[MissedReason]:
    """Missed rewrites grouped by rule and reason, the most frequent first.

    Reasons that differ only in which copy of a node they name are the same reason.
    """
    groups = _grouped(missed, lambda m: (m.pass_name, m.rule, m.stage, reason_kind(m)))
    return [MissedReason(tuple(rows)) for rows in sorted(groups, key=len, reverse=True)]


def reason_kind(missed: MissedRewrite) -> str:
    """The reason without what varies between copies of a block: suffixes, measured figures."""
    text = _COPY.sub(r"`\1`", missed.reason)
    return _NUMBER.sub("#", text) if missed.stage in ("verify", "profit") else text


def strain(certificate: Certificate) -> float:
    """How close the error came to what was allowed: at most 1 where it verified."""
    pairs = [(certificate.error, certificate.bound)]
    if certificate.gradient_error is not None and certificate.gradient_bound is not None:
        pairs.append((certificate.gradient_error, certificate.gradient_bound))
    return max(_ratio(error, bound) for error, bound in pairs)


def _ratio(error: float, bound: float) -> float:
    if math.isnan(error) or math.isnan(bound):
        return math.inf
    if error == 0:
        return 0.0
    return error / bound if bound else math.inf


@dataclass(frozen=True)
class Totals:
    """Counts over all passes; ``None`` where no pass ran."""

    matched: int
    kept: int
    slower: int
    rolled_back: int
    missed: int
    nodes: tuple[int, int] | None
    bytes: tuple[int, int] | None
    seconds: float


def totals(report: Report) -> Totals:
    """What the summary of a report says in numbers."""
    rows = report.passes
    first, last = (rows[0], rows[-1]) if rows else (None, None)
    return Totals(
        matched=sum(p.matched for p in rows),
        kept=sum(p.kept for p in rows),
        slower=sum(p.slower for p in rows),
        rolled_back=sum(p.rolled_back for p in rows),
        missed=sum(m.stage in ("match", "check") for m in report.missed),
        nodes=(first.nodes_before, last.nodes_after) if first and last else None,
        bytes=(first.bytes_before, last.bytes_after) if first and last else None,
        seconds=report.seconds.get("total", sum(report.seconds.values())),
    )


def operators(graph: Iterable[NodeView]) -> int:
    """How many nodes call an operator: all but inputs, parameters, other state and outputs.

    `PassSummary` counts nodes in the same way.
    """
    return sum(view.op not in STATE | {"input", "placeholder", "output"} for view in graph)


def _grouped(rows: Iterable[T], key: Callable[[T], object]) -> Sequence[list[T]]:
    groups: dict[object, list[T]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return list(groups.values())
