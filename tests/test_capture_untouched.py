"""Capture leaves the model, the random state and the process as they were."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.errors import CaptureError


class Busy(nn.Module):
    """Writes buffers, attributes and containers, draws numbers, and mixes modes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.frozen = nn.BatchNorm2d(4).eval()
        self.shapes: list[Any] = []
        self.seen: dict[str, Any] = {}
        self.last: Any = None
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        y = self.frozen(self.norm(self.conv(x)))
        self.shapes.append(y.shape)
        self.seen["last"] = y
        self.last = self.new = y
        return nn.functional.dropout(y, 0.5, self.training)


def test_a_model_is_left_as_it_was() -> None:
    model = Busy().train()
    model.frozen.eval()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    tensors = dict(model.state_dict(keep_vars=True))
    values = {name: t.detach().clone() for name, t in tensors.items()}
    attributes = {path: dict(vars(m)) for path, m in model.named_modules()}
    program = capture(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes={"x": {0: "batch"}})
    after = model.state_dict(keep_vars=True)
    assert all(after[n] is tensors[n] and torch.equal(after[n], values[n]) for n in tensors)
    assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))
    assert attributes == {path: dict(vars(m)) for path, m in model.named_modules()}
    assert model.shapes == [] and model.seen == {} and not hasattr(model, "new")
    assert model.training and not model.frozen.training
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert any("`shapes`" in note for note in program.notes)


def test_a_buffer_that_counts_is_not_mistaken_for_an_attribute_that_does() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            self.shape = tuple(x.shape)
            self.steps += 1
            return x * self.steps

    model = Counts()
    program = capture(model, (torch.ones(2),))
    assert torch.equal(program.run([torch.ones(2)])[1], torch.ones(2)) and model.steps == 0
    assert program.notes == ["forward sets `shape`; the program does not"]


def test_a_failed_capture_leaves_the_model_as_it_was() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.done = 1
            return x if x.sum() > 0 else -x

    model = Fails()
    before = dict(vars(model))
    with pytest.raises(CaptureError):
        capture(model, (torch.ones(2),))
    assert vars(model) == before and not model._forward_hooks


@pytest.mark.parametrize("draw", [True, False])
def test_random_states_are_left_as_they_were(draw: bool) -> None:
    class Draws(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * random.random() + np.random.rand() if draw else x + torch.rand(2)

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    try:
        capture(Draws(), (torch.ones(2),))
    except CaptureError:
        assert draw
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_patches_logs_and_gradient_mode_are_undone() -> None:
    entries = (
        torch.Tensor.register_hook,
        torch.Tensor.backward,
        torch.fx.proxy.TracerBase.create_node,
    )
    with torch.no_grad():
        capture(nn.Linear(2, 2), (torch.ones(1, 2),))
        assert not torch.is_grad_enabled()
    assert entries == (
        torch.Tensor.register_hook,
        torch.Tensor.backward,
        torch.fx.proxy.TracerBase.create_node,
    )
    assert "data" not in vars(torch.Tensor) and logging.root.manager.disable == 0
    with torch.inference_mode():
        assert torch.is_inference_mode_enabled()


def test_example_inputs_are_not_written() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x.shape
            return x.add_(1)

    example = torch.zeros(2)
    program = capture(Writes(), (example,))
    assert torch.equal(example, torch.zeros(2)) and program.example_inputs[0] is example


@pytest.mark.parametrize("training", [True, False])
def test_weights_frozen_follow_the_mode_unless_said(training: bool) -> None:
    model = nn.Linear(2, 2).train(training)
    assert capture(model, (torch.ones(1, 2),)).frozen is not training
    assert capture(model, (torch.ones(1, 2),), frozen=training).frozen is training
