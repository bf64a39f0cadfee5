"""Every option of the Dynamo backend is honoured or refused with what to do instead."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.backend import Backend
from graphopt.errors import GraphoptError, RecipeError
from graphopt.recipe import Options

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


AHEAD_OF_TIME = {
    "dynamic_shapes": ({0: "batch"},),
    "calibration": [torch.ones(2, 4)],
    "quality": lambda model: 1.0,
    "budget": 0.1,
}


@pytest.mark.parametrize("name", AHEAD_OF_TIME)
def test_options_that_need_example_inputs_are_refused_without(name):
    with pytest.raises(GraphoptError) as caught:
        graphopt.compile(nn.Linear(4, 4), **{name: AHEAD_OF_TIME[name]})
    error = caught.value
    assert error.what.startswith(name) and "without example_inputs" in error.what
    assert name in error.where and "pass example_inputs" in error.fix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "inductr"}, "unknown target 'inductr'"),
        ({"quality": lambda model: 1.0}, "quality has no meaning"),
        ({"calibration": [torch.ones(2, 4)]}, "calibration has no meaning"),
        ({"budget": 0.1}, "budget has no meaning"),
        ({"passes": "exakt"}, "exakt"),
        ({"dynamic_shapes": ()}, "unknown backend option 'dynamic_shapes'"),
    ],
)
def test_options_of_torch_compile(options, message):
    fast = torch.compile(nn.Linear(4, 4), backend="graphopt", options=options)
    with pytest.raises((RecipeError, torch._dynamo.exc.BackendCompilerFailed), match=message):
        fast(torch.randn(2, 4))


@pytest.mark.parametrize("options", [{"target": "inductr"}, {"passes": "exakt"}, {"budget": 1.0}])
def test_backends_refuse_when_they_are_made(options):
    with pytest.raises(RecipeError):
        Backend(Options(**options))


def test_unknown_presets_are_refused_at_the_call_of_compile():
    with pytest.raises(RecipeError, match="exakt"):
        graphopt.compile(nn.Linear(4, 4), passes="exakt")


def test_passes_measure_and_progress_are_honoured():
    lines = []
    fast = graphopt.compile(
        nn.Linear(4, 4), passes=["Canonicalize"], measure=False, progress=lines.append
    )
    fast(torch.randn(2, 4))
    assert len(fast.reports[0].recipe) == 1 and lines
