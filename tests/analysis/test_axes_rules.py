"""Every registered rule is held to its word on every axis of every argument of its samples."""

from __future__ import annotations

from collections.abc import Iterator

import axis_samples_index
import axis_samples_layers
import axis_samples_maths
import axis_samples_views
import pytest
import torch
from axis_check import Sample, check

from graphopt.analysis.axis_rules import RULES
from graphopt.analysis.axis_rules.call import full_name

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
