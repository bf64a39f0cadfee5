"""The criterion itself: what passes, what fails, and what counts as noise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.capture import capture
from graphopt.rewrite.rule import Numeric
from graphopt.verify.measure import compare, rms
from graphopt.verify.whole import Outcome, compare_outcomes, run_program

LOOSE = Numeric.REASSOCIATED


def noisy(exact: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed))
    return (exact + size * noise).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_percent_fails_and_rounding_passes(dtype: torch.dtype) -> None:
    exact = torch.randn(200, dtype=torch.float64)
    old = exact.to(dtype)
    rounded = old * (1 + torch.finfo(dtype).eps)
    assert compare(old, rounded, exact, LOOSE).ok
    assert not compare(old, old * 1.01, exact, LOOSE).ok
    assert not compare(old, rounded, exact, Numeric.BITWISE).ok


def test_one_element_far_off_fails() -> None:
    exact = torch.randn(10_000, dtype=torch.float64)
    new = exact.float()
    new[17] *= 1 + 1e-4
    assert compare(exact.float(), new, exact, LOOSE).rms < 1e-5
    assert not compare(exact.float(), new, exact, LOOSE).ok


def test_a_value_that_cancelled_is_held_to_what_it_was_summed_from() -> None:
    exact = torch.zeros(100, dtype=torch.float64) + 1e-12
    old, new, wrong = noisy(exact, 1e-8, 1), noisy(exact, 8e-8, 2), noisy(exact, 1e-4, 3)
    assert not compare(old, new, exact, LOOSE).ok
    assert compare(old, new, exact, LOOSE, magnitude=1.0).ok
    assert not compare(old, wrong, exact, LOOSE, magnitude=1.0).ok


def test_a_small_value_that_did_not_cancel_is_held_to_itself() -> None:
    exact = 1e-6 * torch.randn(100, dtype=torch.float64)
    old = exact.float()
    assert not compare(old, old * 1.01, exact, LOOSE, magnitude=1.0).ok


def test_rms_of_nothing_is_zero() -> None:
    assert rms(torch.ones(0)) == 0.0
    assert rms(torch.tensor([3.0, float("inf"), 4.0])) == pytest.approx(12.5**0.5)


def test_a_lost_gradient_fails_unless_it_was_zero() -> None:
    exact = {"w": torch.ones(5), "unused": torch.zeros(5)}
    outcome = Outcome((), exact)
    assert compare_outcomes(outcome, Outcome((), {"w": exact["w"]}), outcome, LOOSE)[1].ok
    lost = compare_outcomes(outcome, Outcome((), {"unused": exact["unused"]}), outcome, LOOSE)
    assert not lost[1].ok


class NoGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) // 2


def test_an_operator_without_derivative_has_no_gradients_to_compare() -> None:
    x = torch.randn(3, 4)
    program = capture(NoGradient().train(), (x,))
    assert run_program(program, [x], wide=False, grad=True).gradients == {}
    assert graphopt.compile(NoGradient().train(), example_inputs=(x,)).report.verified


class BiasBeforeNorm(nn.Module):
    """The bias has no gradient: the norm takes it out again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        return y * 0.5 * (1 + torch.erf(y / 2**0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_gradients_that_cancel_do_not_alarm(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    model = BiasBeforeNorm().train().to(dtype)
    x = torch.randn(4, 3, 6, 6, dtype=dtype)
    fast = graphopt.compile(model, example_inputs=(x,), measure=False)
    assert "RecognizeGelu" in {a.rule for a in fast.report.applied}
    assert fast.report.verified


def test_values_that_the_model_itself_refuses_are_not_tried_and_that_is_told() -> None:
    given = (torch.rand(60), torch.rand(60).round())
    fast = graphopt.compile(nn.BCELoss().eval(), example_inputs=given, measure=False)
    assert fast.report.verified
    assert any("random inputs were not tried" in note for note in fast.report.notes)
