"""The criterion itself: what passes, what fails, and what counts as noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.capture import capture
from graphopt.program import Program
from graphopt.rewrite.rule import Numeric
from graphopt.verify import trials
from graphopt.verify.inputs import fresh_inputs
from graphopt.verify.measure import compare, rms
from graphopt.verify.trials import DRAWS, hold, rounded_runs
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


def test_a_lossy_value_that_cancelled_is_held_to_the_originals_own_noise() -> None:
    """Gradients of attention on one column are zero, and noise in float64 too."""
    exact = 1e-17 * torch.randn(100, dtype=torch.float64)
    old, wrong = noisy(exact, 5e-8, 1), noisy(exact, 5e-6, 2)
    assert compare(old, torch.zeros(100), exact, Numeric.LOSSY, 0.02).ok
    assert not compare(old, wrong, exact, Numeric.LOSSY, 0.02).ok


def test_a_lossy_value_that_the_original_is_half_right_about_is_held_to_the_tolerance() -> None:
    exact = torch.randn(100, dtype=torch.float64)
    old, new = noisy(exact, 0.5, 1), noisy(exact, 0.1, 2)
    assert not compare(old, new, exact, Numeric.LOSSY, 0.02).ok
    assert compare(old, new, exact, Numeric.LOSSY, 0.2).ok


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


class Magnifying(nn.Module):
    """Squares centred values again and again: a rounding grows at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = 1 - 2 * (x * self.weight) ** 2
        return x


def chaotic() -> tuple[Program, list[torch.Tensor]]:
    x = torch.rand(200, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    return capture(Magnifying().eval(), (x,)), [x]


def test_a_model_that_magnifies_rounding_is_held_to_what_rounding_does_to_it() -> None:
    program, inputs = chaotic()
    others = rounded_runs(program, inputs)
    assert len({run.outputs[0].sum().item() for run in others}) == DRAWS
    reference = run_program(program, inputs, wide=True, grad=False).outputs[0]
    near = [reference.float()]  # as if one run had been exact by luck
    far = others[0].outputs[0]
    assert not compare(near[0], far, reference, LOOSE).ok
    assert compare(near[0], far, reference, LOOSE, rounded=[m.outputs[0] for m in others[1:]]).ok


def test_one_percent_fails_however_sensitive_the_model() -> None:
    exact = torch.randn(200, dtype=torch.float64)
    wild = [torch.randn(200) for _ in range(DRAWS)]
    assert not compare(exact.float(), exact.float() * 1.01, exact, LOOSE, rounded=wild).ok
    assert compare(exact.float(), exact.float() * 1.001, exact, LOOSE, rounded=wild).ok


def test_random_rounding_keeps_what_is_not_finite_and_what_is_whole() -> None:
    program = capture(nn.Threshold(0.0, float("-inf")).eval(), (torch.randn(50),))
    (run, *_) = rounded_runs(program, [torch.tensor([-1.0, 3.0] * 25)])
    assert torch.equal(run.outputs[0].isinf(), torch.tensor([True, False] * 25))
    counted = capture(Counted().eval(), (torch.arange(6),))
    assert torch.equal(rounded_runs(counted, [torch.arange(6)])[0].outputs[0], torch.arange(6) + 1)


class Counted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_the_whole_is_judged_with_random_rounding_where_it_would_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, inputs = chaotic()
    lucky = run_program(program, inputs, wide=True, grad=False).outputs[0].float()
    monkeypatch.setattr(trials, "run_program", _lucky_once(lucky))
    assert hold(program, program, inputs, LOOSE)[0].ok


def _lucky_once(lucky: torch.Tensor) -> Callable[..., Outcome]:
    """`run_program`, but the first run (the original in float32) is exact."""
    calls = []

    def run(*args: Any, **kwargs: Any) -> Outcome:
        calls.append(args)
        return Outcome((lucky,), {}) if len(calls) == 1 else run_program(*args, **kwargs)

    return run


def test_a_target_that_takes_no_gradient_leaves_those_of_the_weights() -> None:
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return nn.functional.soft_margin_loss(self.linear(x), y)

    given = (torch.randn(3, 4), torch.randn(3, 4).sign())
    program = capture(Scored().train(), given)
    assert set(run_program(program, given, wide=False, grad=True).gradients) == {
        "linear.weight",
        "linear.bias",
    }
    assert graphopt.compile(Scored().train(), example_inputs=given).report.verified


def test_values_that_the_model_itself_refuses_are_not_tried_and_that_is_told() -> None:
    given = (torch.rand(60), torch.rand(60).round())
    fast = graphopt.compile(nn.BCELoss().eval(), example_inputs=given, measure=False)
    assert fast.report.verified
    assert any("random inputs were not tried" in note for note in fast.report.notes)


class WithNoise(nn.Module):
    """A factor times the input, plus what an operator draws."""

    def __init__(self, factor: float, draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.factor, self.draw = factor, draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x + self.draw(x)


DRAWN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(x.shape),
    "bernoulli": lambda x: torch.bernoulli(torch.sigmoid(x)),
    "normal": lambda x: torch.normal(x, 1.0),
    "in place": lambda x: x.clone().uniform_(),
    "gumbel": nn.functional.gumbel_softmax,
    "dropout": lambda x: nn.functional.dropout(x, 0.5, True),
}


@pytest.mark.parametrize("name", DRAWN)
def test_one_percent_fails_next_to_random_numbers(name: str) -> None:
    x = torch.randn(32, 32)
    program, wrong = (capture(WithNoise(f, DRAWN[name]).eval(), (x,)) for f in (1.0, 1.01))
    assert hold(program, program, [x], LOOSE)[0].ok
    assert not hold(program, wrong, [x], LOOSE)[0].ok


def test_complex_values_are_held_to_float64_too() -> None:
    exact = torch.randn(200, dtype=torch.complex128)
    old = exact.to(torch.complex64)
    rounded = old * (1 + torch.finfo(torch.float32).eps)
    assert compare(old, rounded, exact, LOOSE).ok
    assert not compare(old, rounded, exact, Numeric.BITWISE).ok
    assert not compare(old, old * 1.01, exact, LOOSE).ok
    assert not compare(old, old.conj().resolve_conj(), exact, LOOSE).ok


@pytest.mark.parametrize("example", [torch.zeros(4, 8), torch.ones(4, 8), torch.full((4, 8), -3.0)])
def test_constant_examples_still_tell_operators_apart(example: torch.Tensor) -> None:
    fresh = fresh_inputs(capture(nn.ReLU().eval(), (example,)))[0]
    assert bool((fresh > 0).any()) and bool((fresh < 0).any())


def test_floating_masks_stay_masks() -> None:
    lowest = torch.finfo(torch.float32).min
    mask = torch.tensor([0.0, lowest, 0.0, 0.0, lowest, lowest]).reshape(2, 3)
    fresh = fresh_inputs(capture(nn.ReLU().eval(), (mask,)))[0]
    assert set(fresh.flatten().tolist()) <= {0.0, lowest}
