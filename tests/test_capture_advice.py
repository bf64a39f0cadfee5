"""Advice in errors can be followed: by the user of `graphopt.compile`, with the same model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.conditions import compiled
from graphopt.errors import CaptureError, GraphoptError


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def build(function, x, **options):
    model = Calls(function).eval()
    return model, graphopt.compile(model, example_inputs=(x,), measure=False, **options)


def written(x):
    return x.reshape(10, 2, 2) * 2


def test_an_axis_that_the_model_fixes_can_be_left_to_the_tracer():
    x = torch.randn(10, 4)
    with pytest.raises(CaptureError, match="declared dynamic") as caught:
        build(written, x, dynamic_shapes=({0: "b"},))
    assert "specialize" not in caught.value.fix and "Dim.AUTO" in caught.value.fix
    model, fast = build(written, x, dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.testing.assert_close(fast(x), model(x))
    assert any("is fixed at 10 by the model" in note for note in fast.report.notes)


SIZES = {
    "half": lambda x: x[: round(x.shape[0] / 2)] * 2,
    "rounded branch": lambda x: x * 2 if round(x.shape[0] * 0.3) >= 1 else x[:1],
    "root branch": lambda x: x * 2 if x.shape[0] ** 0.5 > 1.1 else x[:1],
    "root": lambda x: x * x.shape[0] ** 0.5,
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_are_rounded_or_roots(name):
    model, fast = build(SIZES[name], torch.randn(10, 4), dynamic_shapes=({0: "b"},))
    for size in (5, 6, 7, 9, 10):  # halves round to even
        x = torch.randn(size, 4)
        torch.testing.assert_close(fast(x), model(x))


def test_a_root_that_becomes_a_size_is_guarded_and_shown_readably():
    model, fast = build(
        lambda x: x[: int(x.shape[0] ** 0.5)] * 2, torch.randn(10, 4), dynamic_shapes=({0: "b"},)
    )
    x = torch.randn(9, 4)
    torch.testing.assert_close(fast(x), model(x))
    with pytest.raises(GraphoptError) as caught:
        fast(torch.randn(16, 4))
    assert "math.trunc(b ** 0.5) == 3, but b = 16" in caught.value.what


def test_conditions_that_cannot_be_checked_say_what_can():
    with pytest.raises(GraphoptError, match="not a condition on sizes") as caught:
        compiled("math.gamma(s0) > 2", ["s0"])
    assert "round" in caught.value.fix and "dynamic_shapes" in caught.value.fix
    with pytest.raises(GraphoptError, match="not a condition on sizes"):
        compiled("torch.load(s0)", ["s0"])


FAILING = {
    "dtype": (lambda x: nn.functional.linear(x.long(), torch.ones(4, 4)), "same dtype"),
    "overflow": (lambda x: x.masked_fill(x > 0, -1e39), "without overflow"),
    "index": (lambda x: x.gather(0, torch.full((2, 2), 99)), "index 99 is out of bounds"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_model_that_fails_on_the_example_inputs(name):
    function, message = FAILING[name]
    with pytest.raises(CaptureError, match=message) as caught:
        build(function, torch.randn(10, 4))
    error = caught.value
    assert error.what.startswith("Calls itself fails on the example inputs: RuntimeError")
    line = function.__code__.co_firstlineno
    assert error.where == f"{__file__}:{line}" and "eager mode" in error.fix


def test_a_model_without_lines_of_the_user():
    with pytest.raises(CaptureError, match="Linear itself fails") as caught:
        graphopt.compile(nn.Linear(4, 4).eval(), example_inputs=torch.ones(2, 4, dtype=torch.long))
    assert caught.value.where is None
