"""Formats for a size: against every possible set, and against the closed form."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.passes.quantize.allocation import Choice, allocate, frontier

CHOICES = st.lists(st.builds(Choice, st.integers(1, 40), st.floats(0, 100)), min_size=1, max_size=4)


def sets(weights: list[list[Choice]]) -> list[tuple[int, float]]:
    return [(sum(c.bytes for c in s), sum(c.loss for c in s)) for s in product(*weights)]


@given(st.lists(CHOICES, min_size=1, max_size=4))
def test_no_set_is_better_at_the_size_of_a_step(weights: list[list[Choice]]) -> None:
    points = list(frontier(weights))
    every = sets(weights)
    for point in points:
        best = min(loss for size, loss in every if size <= point.bytes)
        assert point.loss <= best + 1e-6 * (1 + best)
        picked = [w[i] for w, i in zip(weights, point.chosen, strict=True)]
        assert point.bytes == sum(c.bytes for c in picked)
        assert math.isclose(point.loss, sum(c.loss for c in picked), abs_tol=1e-6)
    assert points[0].bytes == min(size for size, _ in every)
    least = min(loss for _, loss in every)
    assert points[-1].loss <= least + 1e-6 * (1 + least)
    assert [p.bytes for p in points] == sorted({p.bytes for p in points})


@given(st.lists(CHOICES, min_size=1, max_size=4), st.integers(0, 160))
def test_an_allocation_fits_and_nothing_that_fits_improves_it(
    weights: list[list[Choice]], size: int
) -> None:
    smallest = min(total for total, _ in sets(weights))
    if size < smallest:
        with pytest.raises(ValueError, match=f"take {smallest} bytes"):
            allocate(weights, size)
        return
    found = allocate(weights, size)
    assert found.bytes <= size
    best = min(loss for total, loss in sets(weights) if total <= size)
    dearest = max(c.loss for w in weights for c in w)
    assert best - 1e-6 <= found.loss <= best + dearest
    for index, choices in enumerate(weights):
        now = choices[found.chosen[index]]
        for other in choices:
            if found.bytes + other.bytes - now.bytes <= size:
                assert other.loss >= now.loss - 1e-9


def test_bits_are_those_of_the_closed_form() -> None:
    """Losses of sensitivity times ``4 ** -bits``: bits differ by half its logarithm."""
    generator = random.Random(0)
    sensitivities = [4.0 ** generator.randint(-2, 2) for _ in range(12)]
    weights = [[Choice(100 * b, s * 4.0**-b) for b in range(1, 13)] for s in sensitivities]
    middle = sum(math.log2(s) / 2 for s in sensitivities) / 12
    wanted = [5 + math.log2(s) / 2 - middle for s in sensitivities]
    size = round(sum(wanted)) * 100
    bits = [i + 1 for i in allocate(weights, size).chosen]
    assert all(abs(b - w) <= 1 for b, w in zip(bits, wanted, strict=True))
    assert sum(bits) * 100 <= size


@pytest.mark.parametrize("bad", [[], [Choice(-1, 0.0)], [Choice(1, math.nan)]])
def test_choices_that_are_none(bad: list[Choice]) -> None:
    with pytest.raises(ValueError, match="numbers from 0"):
        list(frontier([[Choice(1, 1.0)], bad]))
