"""Inductor as the next stage: kept where it is right, put back where it is not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule as Compiled

import graphopt
from graphopt.emit.held import fault
from graphopt.errors import VerificationError
from graphopt.passes import QuantizeMatmul
from graphopt.rewrite import Numeric
from graphopt.verify import trials
from graphopt.verify.trials import hold
from graphopt.verify.unrounded import unrounded

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


class Model(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.enter, self.leave, self.drop = nn.Linear(8, 12), nn.Linear(12, 3), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.drop(torch.tanh(self.enter(x)))).softmax(-1)


def _inductor(model: nn.Module, x: Tensor, **options: Any) -> Any:
    return graphopt.compile(model, example_inputs=(x,), target="inductor", measure=False, **options)


def test_runs_through_inductor_at_other_sizes() -> None:
    model = Model().eval()
    fast = _inductor(model, torch.randn(4, 8), dynamic_shapes=({0: "batch"},))
    assert isinstance(fast._graph.code, Compiled)
    assert not any("Inductor" in note for note in fast.report.notes)
    for batch in (4, 7):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_trains_through_inductor(drop: float) -> None:
    model, x = Model(drop).train(), torch.randn(64, 8)
    fast = _inductor(model, x)
    assert isinstance(fast._graph.code, Compiled)
    out = fast(x)
    out[:, 0].sum().backward()
    gradient = model.enter.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0
    if drop == 0:
        taken, model.enter.weight.grad = gradient.clone(), None
        model(x)[:, 0].sum().backward()
        torch.testing.assert_close(taken, model.enter.weight.grad, rtol=1e-4, atol=1e-6)


class StandIn(nn.Module):
    """What `torch.compile` gives, with values and gradients off by factors."""

    def __init__(self, graph: nn.Module, forward: float, backward: float) -> None:
        super().__init__()
        self.graph, self.factors = graph, (forward, backward)

    def forward(self, *flat: Any) -> Any:
        return tuple(_Scaled.apply(value, *self.factors) for value in self.graph(*flat))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.factor, None, None


class Failing(nn.Module):
    def forward(self, *_flat: Any) -> Any:
        raise torch._dynamo.exc.InternalTorchDynamoError("no such luck")


@pytest.mark.parametrize(
    ("training", "forward", "backward"), [(False, 1.01, 1.0), (True, 1.01, 1.0), (True, 1.0, 1.01)]
)
def test_wrong_code_is_put_back(
    monkeypatch: pytest.MonkeyPatch, training: bool, forward: float, backward: float
) -> None:
    model, x = Model().train(training), torch.randn(4, 8)
    monkeypatch.setattr(torch, "compile", lambda graph, **_: StandIn(graph, forward, backward))
    fast = _inductor(model, x)
    assert any("is wrong" in note and "torch target was kept" in note for note in fast.report.notes)
    torch.testing.assert_close(fast(x), model(x))
    with pytest.raises(VerificationError, match="Inductor's code for Model is wrong"):
        _inductor(model, x, strict=True)


def test_code_that_cannot_be_made_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Model().eval(), torch.randn(4, 8)
    monkeypatch.setattr(torch, "compile", lambda _graph, **_: Failing())
    fast = _inductor(model, x)
    assert any("cannot be made: no such luck" in note for note in fast.report.notes)
    torch.testing.assert_close(fast(x), model(x))


def _judged(activations: str | None, factor: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the report says of code that is off by a factor, behind quantized products."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: StandIn(graph, factor, 1.0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)).eval()
    passes = [QuantizeMatmul(bits=8, activations=activations, head=True)]
    fast = _inductor(model, torch.randn(200, 64), passes=passes)
    return [note for note in fast.report.notes if "the torch target was kept" in note]


def test_code_may_round_activations_otherwise_as_much_as_rounding_costs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their rounding costs about 1 %; where nothing is rounded, 0.3 % is too much."""
    assert not _judged("dynamic", 1.003, monkeypatch)
    assert _judged("dynamic", 1.05, monkeypatch)
    assert _judged(None, 1.003, monkeypatch)


def test_what_rounds_on_the_way_is_held_to_the_models_own_error_where_that_is_larger() -> None:
    """That of a model in bfloat16 is about half a percent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)).bfloat16().eval()
    x = torch.randn(100, 64).bfloat16()
    program = graphopt.compile(model, example_inputs=(x,), passes="none").program

    def off(factor: float) -> Any:
        return lambda graph: lambda *flat: tuple(v * factor for v in graph(*flat))

    assert fault(program, program, off(1.004), tolerance=1e-3) is None
    assert fault(program, program, off(0.95), tolerance=1e-3) is not None
    assert fault(program, program, off(0.95), tolerance=0.1) is None


def test_a_run_that_lost_little_by_luck_is_no_bound_for_what_rounds_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs with random rounding say what rounding activations costs the model."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)).eval(), (100, 64)
    passes = [QuantizeMatmul(bits=8, activations="dynamic", head=True)]
    program = graphopt.compile(model, example_inputs=(torch.randn(x),), passes=passes).program
    inputs = list(program.example_inputs)

    def judged(program: Any, reference: Any) -> bool:
        lower = lambda graph: lambda *flat: tuple(1.04 * v for v in graph(*flat))  # noqa: E731
        given = (program, program, inputs, Numeric.REASSOCIATED)
        return hold(*given, lower=lower, reference=reference)[0].ok

    plain = unrounded(program)
    assert not judged(program, plain) and not judged(plain, None)
    real = trials.run_program

    def unlucky(*given: Any, **options: Any) -> Any:
        made = real(*given, **options)
        drawn = isinstance(options.get("lower"), partial)
        return replace(made, outputs=[1.05 * v for v in made.outputs]) if drawn else made

    monkeypatch.setattr(trials, "run_program", unlucky)
    assert judged(program, plain)
    assert not judged(plain, None)
