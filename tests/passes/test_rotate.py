"""Rotations folded into weights: where they go, what stops them, and that nothing else changes."""

from __future__ import annotations

import pytest
from generated.harness import Only, run_example

from graphopt.passes.quantize.rotation_heads import RotateHeads
from graphopt.passes.quantize.rotation_stream import RotateStream
from graphopt.rewrite import Example, Rule


def cases(kind: str) -> list[object]:
    rules: tuple[Rule, ...] = (RotateStream(), RotateHeads())
    return [
        pytest.param(rule, example, id=f"{rule.name}-{example.name}")
        for rule in rules
        for example in getattr(rule, kind)()
    ]


@pytest.mark.parametrize(("rule", "example"), cases("examples"))
def test_examples_are_rewritten_and_verify(rule: Rule, example: Example) -> None:
    outcome = run_example(example, Only(rule), tuple(rule.prepare()))
    assert len(outcome.report.applied) == example.count, outcome.report.missed
    assert outcome.sound, outcome.report.whole


@pytest.mark.parametrize(("rule", "example"), cases("near_misses"))
def test_near_misses_are_left_alone(rule: Rule, example: Example) -> None:
    outcome = run_example(example, Only(rule), tuple(rule.prepare()))
    assert outcome.report.applied == []
    assert outcome.sound
    reasons = [m.reason for m in outcome.report.missed]
    assert not example.reason or any(example.reason in r for r in reasons), reasons
