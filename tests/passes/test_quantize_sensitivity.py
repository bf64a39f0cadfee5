"""Estimates of the loss that rounding causes, against the loss as measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.passes import QuantizeMatmul
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.quantize.gradients import slopes
from graphopt.passes.quantize.sensitivity import Target, choices
from graphopt.passes.quantize.weights import QuantizeWeights
from graphopt.program import Program
from graphopt.rewrite.driver import apply_rules

WIDTH, CLASSES = 24, 10
ALL = {"embeddings": True, "head": True, "activations": None}


class Two(nn.Module):
    """Two products, whose inputs differ in size by channel, and a head."""

    def __init__(self, *, named: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, CLASSES)
        self.named = named

    def forward(self, x: Tensor) -> Any:
        made = self.last(F.gelu(self.first(x)))
        return {"logits": made} if self.named else made


def inputs(count: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = torch.logspace(-1, 1, WIDTH)
    return [torch.randn(5, 8, WIDTH, generator=generator) * sizes for _ in range(count)]


def captured(model: nn.Module, x: Tensor) -> Program:
    program = capture(model.eval(), (x,), None)
    apply_rules(program, Canonicalize().rules())
    return program


def targets(program: Program, **options: Any) -> list[Target]:
    given = QuantizeMatmul(**{**ALL, **options})
    last = given.stages()[-1]
    assert isinstance(last, QuantizeWeights)
    found = last.targets(program)
    return [Target(m, rule.matrices(m), [given.settings]) for rule, m in found]


def measured(model: nn.Module, name: str, program: Program, **options: Any) -> float:
    """The loss when one weight alone is rounded."""
    from graphopt.passes.quantize.plan import rounded

    (target,) = (t for t in targets(program, **options) if program.target_of(t.weight) == name)
    settings = target.settings[0]
    matrix = target.matrices[0]
    stored = rounded(matrix.detach(), settings.scheme, settings.methods).dequantize()
    losses = []
    for x in inputs():
        with torch.no_grad():
            wanted = model(x)
            found = torch.func.functional_call(model, {name: stored}, (x,))
        if isinstance(wanted, Mapping):
            p, q = (v["logits"].flatten(0, -2).log_softmax(-1) for v in (wanted, found))
            losses.append(float((p.exp() * (p - q)).sum(-1).mean()))
        else:
            losses.append(float((found - wanted).square().sum() / wanted.square().sum()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("named", [False, True], ids=["outputs", "logits"])
@pytest.mark.parametrize("bits", [4, 6])
def test_estimates_are_near_what_is_measured(named: bool, bits: int) -> None:
    torch.manual_seed(0)
    model = Two(named=named)
    program = captured(model, inputs(1)[0])
    found = targets(program, bits=bits)
    made = choices(program, found, [[x] for x in inputs()], "output", lambda _text: None)
    for target, (choice,) in zip(found, made, strict=True):
        name = program.target_of(target.weight) or ""
        wanted = measured(model, name, program, bits=bits)
        assert 0.5 * wanted < choice.loss < 2 * wanted, name


def test_the_hessian_does_not_see_which_inputs_are_large_but_the_mean_of_all() -> None:
    """f = W x: the Hessian's diagonal for an entry of column k is the sum of x_k squared."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 64, bias=False)
    x = inputs(1)[0]
    program = captured(model, x)
    (target,) = targets(program)
    samples = [[v] for v in inputs(4)]
    found = slopes(program, samples, [], [target.weight])
    with torch.no_grad():
        exact = [v.square().sum() / WIDTH / model(v).square().sum() for v in inputs(4)]
    wanted = float(sum(exact) / len(exact))
    assert found.weights[target.weight] == pytest.approx(wanted, rel=0.1)
    ((choice,),) = choices(program, [target], samples, "hessian", lambda _text: None)
    from graphopt.passes.quantize.plan import rounded

    settings = target.settings[0]
    stored = rounded(model.weight.detach(), settings.scheme, settings.methods)
    off = float((stored.dequantize() - model.weight.detach()).square().sum())
    assert choice.loss == pytest.approx(found.weights[target.weight] * off, rel=1e-5)
    assert choice.bytes == stored.nbytes


class Mixed(nn.Module):
    """A convolution, and a table that the head shares."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.words(indices)
        return F.linear(x + self.conv(x.mT).mT, self.words.weight)


def test_other_readers_of_weights_are_judged_by_the_hessian() -> None:
    torch.manual_seed(0)
    indices = torch.arange(30).view(2, 15)
    program = captured(Mixed(), indices)
    found = targets(program, bits=8)
    assert len(found) == 2
    samples = [[indices], [indices.flip(1)]]
    by = {
        kind: choices(program, found, samples, kind, lambda _text: None)
        for kind in ("output", "hessian")
    }
    assert by["output"] == by["hessian"]
    assert all(choice.loss > 0 for (choice,) in by["output"])


def test_a_program_without_outputs_in_floats() -> None:
    class Index(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).argmax(-1)

    program = captured(Index(), inputs(1)[0])
    with pytest.raises(GraphoptError, match="returns no floats"):
        slopes(program, [[inputs(1)[0]]], [], [])


def test_samples_are_repeated_until_there_are_enough_gradients() -> None:
    """One sample gives as many draws as sixteen do."""
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, 64, bias=False)
    x = inputs(1)[0]
    program = captured(model, x)
    (target,) = targets(program)
    with torch.no_grad():
        wanted = float(x.square().sum() / WIDTH / model(x).square().sum())
    found = slopes(program, [[x]], [], [target.weight])
    assert found.weights[target.weight] == pytest.approx(wanted, rel=0.1)
