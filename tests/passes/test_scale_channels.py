"""Factors between layers: where they go, what stops them, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from generated.harness import Only, run_example
from torch import Tensor

from graphopt.analysis.channels import follow
from graphopt.capture import capture
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.quantize.scaling import ScaleChannels, match_of
from graphopt.passes.quantize.scaling_examples import Model, examples, near_misses
from graphopt.program import Program
from graphopt.rewrite import Example
from graphopt.rewrite.driver import apply_rules


def captured(example: Example) -> Program:
    torch.manual_seed(1234)
    module = example.module().train(example.training)
    torch.manual_seed(4321)
    program = capture(module, example.inputs(), dynamic_shapes=example.dynamic_shapes)
    apply_rules(program, list(Canonicalize().rules()))
    return program


def rule_for(example: Example) -> ScaleChannels:
    """Factors for every producer that there is."""
    program = captured(example)
    generator = torch.Generator().manual_seed(0)
    factors: dict[str, Tensor | None] = {}
    for node in program.graph.nodes:
        if (match := match_of(program, node)) is not None:
            count = len(match["channels"].free)
            factors[node.name] = torch.rand(count, generator=generator) * 3 + 0.2
    return ScaleChannels(factors)


@pytest.mark.parametrize("example", examples(), ids=lambda e: e.name)
def test_examples_are_rewritten_and_verify(example: Example) -> None:
    rule = rule_for(example)
    outcome = run_example(example, Only(rule), tuple(rule.prepare()))
    assert len(outcome.report.applied) >= example.count, outcome.report.missed
    assert outcome.sound, outcome.report.whole


@pytest.mark.parametrize("example", near_misses(), ids=lambda e: e.name)
def test_near_misses_are_left_alone(example: Example) -> None:
    rule = rule_for(example)
    outcome = run_example(example, Only(rule), tuple(rule.prepare()))
    assert outcome.report.applied == []
    assert outcome.sound
    reasons = [m.reason for m in outcome.report.missed]
    assert not example.reason or any(example.reason in r for r in reasons), reasons


def labels(function: object, *, reader: str = "two") -> tuple[list[bool], list[int]]:
    """Free channels of the first product, and the channel of each input of another."""
    torch.manual_seed(0)
    program = capture(Model(function).eval(), (torch.randn(2, 5, 8),))  # type: ignore[arg-type]
    apply_rules(program, list(Canonicalize().rules()))
    products = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    found = follow(program, products[0])
    names = {program.target_of(n.args[1]): v for n, v in found.readers.items()}
    return found.free.tolist(), names[f"{reader}.weight"].tolist() if names else []


def test_channels_of_inputs() -> None:
    free, of = labels(lambda m, x: m.two(m.one(x).flip(-1)))
    assert (free, of) == ([True] * 8, [7, 6, 5, 4, 3, 2, 1, 0])
    free, of = labels(
        lambda m, x: m.two(torch.cat([m.small(x), x[..., :2], m.small(x)[..., 2:]], -1))
    )
    assert (free, of) == ([True] * 4, [0, 1, 2, 3, -1, -1, -1, -1])
    free, of = labels(
        lambda m, x: m.two(m.small(x).view(2, 5, 2, 2).repeat_interleave(2, 2).flatten(2))
    )
    assert (free, of) == ([True] * 4, [0, 1, 0, 1, 2, 3, 2, 3])


def test_channels_are_pinned_one_by_one() -> None:
    """Sums of different channels, and parts that reach what passes no factor on."""
    free, of = labels(lambda m, x: m.two((y := m.one(x)) * torch.sigmoid(y[..., :1])))
    assert free == [False, *[True] * 7]
    free, of = labels(lambda m, x: m.two((y := m.one(x)) * y))
    assert free == [False] * 8  # a product of two values that carry factors
    free, of = labels(lambda m, x: (m.two(y := m.one(x)), y[..., 2:4].exp()))
    assert free == [True, True, False, False, True, True, True, True]
    assert of == list(range(8))
    free, _ = labels(
        lambda m, x: m.two(torch.cat([(y := m.one(x))[..., :4] + y[..., 4:], y[..., 4:]], -1))
    )
    assert free == [False] * 8
    free, _ = labels(lambda m, x: m.two(x.softmax(-2).transpose(1, 2) @ m.one(x)))
    assert free == [True] * 8
    free, _ = labels(lambda m, x: m.two((m.one(x).transpose(1, 2) @ x).transpose(1, 2)[:, :5]))
    assert free == [False] * 8  # summed along the channels
