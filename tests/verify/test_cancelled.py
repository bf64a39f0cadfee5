"""Values that cancel on one set of inputs excuse rounding there, and nothing else."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.passes import QuantizeMatmul
from graphopt.verify.fidelity import energy
from graphopt.verify.measure import ABOVE, EXACT, Measure
from graphopt.verify.replay import Verdict, excuse_cancelled

BOUND = 0.05


def _verdict(value: Tensor, exact: Tensor, note: str = ABOVE) -> Verdict:
    """One set of inputs, judged by itself."""
    found = energy(value, exact)
    assert found is not None
    ok = found.error <= BOUND
    measure = Measure(found.error, found.error, 0.0, BOUND, ok, "" if ok else note)
    return Verdict(cast(Any, None), measure, runs=1, energies=(found,))


def _sets(noise: float, note: str = ABOVE) -> list[Verdict]:
    """Many values of size 1, and a few of size 0.05 with some noise."""
    torch.manual_seed(0)
    many, few = torch.randn(1000), 0.05 * torch.randn(100)
    return [
        _verdict(many + 0.01 * torch.randn(1000), many),
        _verdict(few + noise * torch.randn(100), few, note),
    ]


def test_noise_that_is_small_beside_all_values_is_excused() -> None:
    usual, cancelled = verdicts = _sets(0.03)
    assert usual.ok and not cancelled.ok
    excuse_cancelled(verdicts)
    assert cancelled.ok and cancelled.outputs.note == "" and usual.ok
    assert cancelled.outputs.rms == pytest.approx(0.03, rel=0.2)


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_noise_that_is_not_stays_refused(noise: float) -> None:
    verdicts = _sets(noise)
    excuse_cancelled(verdicts)
    assert not verdicts[1].ok


def test_nothing_else_is_excused() -> None:
    verdicts = _sets(0.03, "infinities or NaN in other places")
    excuse_cancelled(verdicts)
    assert not verdicts[1].ok
    exact = Verdict(cast(Any, None), EXACT, runs=1)
    verdicts = [*_sets(0.03), exact]
    excuse_cancelled(verdicts)
    assert not verdicts[1].ok, "a set of which nothing is known"


class Sink(nn.Module):
    """A token that is alone adds to nothing but what the product does not see."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 32, bias=False)
        unseen = torch.zeros(64)
        unseen[3] = 8.0
        self.linear.weight.data[:, 3] = 0.0
        self.unseen = nn.Buffer(unseen)

    def forward(self, x: Tensor) -> Tensor:
        apart = x - x.mean(1, keepdim=True) + 0.01 * x
        return x[..., :32] + self.linear(apart + self.unseen).sin()


def test_a_layer_is_quantized_though_one_token_comes_to_nothing() -> None:
    model, x = Sink().eval(), torch.randn(4, 16, 64)
    fast = graphopt.compile(
        model,
        example_inputs=(x,),
        dynamic_shapes=({0: "batch", 1: "length"},),
        passes=[QuantizeMatmul()],
        measure=False,
    )
    (applied,) = (a for a in fast.report.applied if a.rule == "QuantizeLinear")
    assert applied.certificate.error < applied.certificate.bound
    assert (fast(x) - model(x)).norm() < 0.05 * model(x).norm()
