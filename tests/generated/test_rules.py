"""Every rule of every registered pass, on its own examples and near misses."""

from __future__ import annotations

import pytest
from generated.harness import Only, run_example

from graphopt.rewrite import registered_passes

ASKED_FOR = {"QuantizeMatmul": {"embeddings": True}}
"""Options without which a rule of the pass refuses everything, and says which would allow it."""


def _cases(kind: str):
    for name, made in registered_passes().items():
        for rule in made().rules():
            for example in getattr(rule, kind)():
                yield pytest.param(rule, example, id=f"{name}-{rule.name}-{example.name}")


@pytest.mark.parametrize(("rule", "example"), _cases("examples"))
def test_example_is_rewritten_and_verifies(rule, example):
    outcome = run_example(example, Only(rule), tuple(rule.prepare()))
    assert len(outcome.report.applied) >= example.count, outcome.report.missed
    assert outcome.sound, outcome.report.whole
    assert all(a.certificate.runs == len(outcome.report.whole) for a in outcome.report.applied)


@pytest.mark.parametrize(("rule", "example"), _cases("near_misses"))
def test_near_miss_is_left_alone_and_explained(rule, example):
    outcome = run_example(example, Only(rule), tuple(rule.prepare()))
    assert outcome.report.applied == []
    assert outcome.sound
    reasons = [m.reason for m in outcome.report.missed]
    assert not example.reason or any(example.reason in r for r in reasons), reasons


def test_every_rule_has_examples_near_misses_and_a_source():
    for name, made in registered_passes().items():
        for rule in made(**ASKED_FOR.get(name, {})).rules():
            assert rule.__doc__, rule.name
            assert list(rule.examples()), f"{rule.name} has no example"
            assert list(rule.near_misses()), f"{rule.name} has no near miss"
