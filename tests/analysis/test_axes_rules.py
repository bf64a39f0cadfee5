"""Every registered rule is held to its word on every axis of every argument of its samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import axis_samples_index
import axis_samples_layers
import axis_samples_maths
import axis_samples_views
import pytest
import torch
from axis_check import Sample, check

from graphopt.analysis.axis_rules import RULES, pointwise, reduce
from graphopt.analysis.axis_rules.call import full_name
from graphopt.errors import GraphoptError

SAMPLES = [
    *axis_samples_views.SAMPLES,
    *axis_samples_maths.SAMPLES,
    *axis_samples_layers.SAMPLES,
    *axis_samples_index.SAMPLES,
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Operators this small lose more than they gain by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_rule_is_sound_and_tight(sample: Sample) -> None:
    check(sample)


def test_every_rule_has_a_sample() -> None:
    missing = set(RULES) - {full_name(sample.name) for sample in SAMPLES}
    assert not missing


@pytest.mark.parametrize("name", ["softmax.int", "cumsum", "layer_norm", "sort", "roll", "gather"])
def test_a_rule_that_calls_everything_elementwise_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, full_name(name), pointwise.elementwise)
    assert _caught(name)


@pytest.mark.parametrize("name", ["softmax.int", "linear", "transpose.int", "conv2d", "cat"])
def test_a_rule_that_calls_everything_mixed_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RULES, full_name(name), lambda call: reduce._everything(call, "reduce"))
    assert _caught(name)


@pytest.mark.parametrize("name", ["slice.Tensor", "tril", "scaled_dot_product_attention"])
def test_a_rule_that_wrongly_says_as_is_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = RULES[full_name(name)]
    monkeypatch.setitem(RULES, full_name(name), lambda call: replace(honest(call), as_is=True))
    assert _caught(name)


@pytest.mark.parametrize("name", ["where.ScalarOther", "batch_norm", "cross_entropy_loss"])
def test_a_rule_that_forgets_aligned_operands_is_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = RULES[full_name(name)]
    monkeypatch.setitem(RULES, full_name(name), lambda call: replace(honest(call), aligned=()))
    assert _caught(name)


def _caught(name: str) -> bool:
    """Whether any sample of an operator fails its check."""
    for sample in SAMPLES:
        if sample.name == name:
            try:
                check(sample)
            except (AssertionError, GraphoptError, RuntimeError, ValueError, IndexError):
                return True
    return False
