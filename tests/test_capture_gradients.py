"""Gradients through a program are those of eager mode, or the capture refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from graphopt.capture import capture
from graphopt.errors import CaptureError
from graphopt.signature import OutputKind


class Two(nn.Module):
    """Two linear layers and a buffer around a function of the test."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def no_grad(m: Two, x: Tensor) -> Tensor:
    y = m.a(x)
    with torch.no_grad():
        z = m.b(y).sigmoid()
    return y * z


def nested(m: Two, x: Tensor) -> Tensor:
    y = m.a(x)
    with torch.no_grad():
        z = torch.sigmoid(y * 2)
        with torch.enable_grad():
            w = m.b(z) + m.a(y)
        v = w + z
    return y + z + w + v


@torch.no_grad()
def _decorated(m: Two, x: Tensor) -> Tensor:
    return m.b(x).relu()


def decorator(m: Two, x: Tensor) -> Tensor:
    return _decorated(m, x) * m.a(x)


def switched(m: Two, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    z = m.b(x)
    torch.set_grad_enabled(True)
    return m.a(x) + z


def inference_mode(m: Two, x: Tensor) -> Tensor:
    with torch.inference_mode():
        z = m.b(x)
    return m.a(x) + z.clone()


def autocast_and_no_grad(m: Two, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.a(x)
        with torch.no_grad():
            z = m.b(x)
        with torch.autocast("cpu", enabled=False):
            w = m.b(y.float())
        y = y + z
    return y + w


def moving_average(m: Two, x: Tensor) -> Tensor:
    y = m.a(x)
    with torch.no_grad():
        m.mean.mul_(0.9).add_(y.mean(0) * 0.1)
    return m.b(y - m.mean)


def detached(m: Two, x: Tensor) -> Tensor:
    return m.a(x) * m.b(x).detach()


def data(m: Two, x: Tensor) -> Tensor:
    return m.a(x) * m.b(x).data


def condition(m: Two, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda v: m.a(v), lambda v: m.b(v), (x,))


def checkpointed(m: Two, x: Tensor) -> Tensor:
    return m.b(checkpoint(lambda v: m.a(v).relu(), x, use_reentrant=False))


def slices(m: Two, x: Tensor) -> Tensor:
    table = torch.zeros(3, 8)
    table[:, :4] = m.a(x)
    table[:, 4] = 1.0
    return table.sin() @ torch.ones(8, 2)


def written_activation(m: Two, x: Tensor) -> Tensor:
    y = m.a(x)
    y.mul_(2)
    y[0].add_(m.b(x)[1])
    return y


CASES = [
    no_grad,
    nested,
    decorator,
    switched,
    inference_mode,
    autocast_and_no_grad,
    moving_average,
    detached,
    data,
    condition,
    checkpointed,
    slices,
    written_activation,
]


def gradients(results: Any, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    loss = sum(r.double().square().sum() for r in pytree.tree_leaves(results) if r.requires_grad)
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


@pytest.mark.parametrize("function", CASES)
def test_gradients_are_those_of_eager(function: Any) -> None:
    model, example = Two(function).train(), torch.randn(3, 4)
    program = capture(model, (example,))
    results = program.run([example])
    kinds = [o.kind for o in program.outputs]
    users = [r for r, kind in zip(results, kinds, strict=True) if kind is OutputKind.USER]
    parameters = list(model.parameters())
    found = gradients(users, [program.state[n] for n, _ in model.named_parameters()])
    wanted = gradients(model(example), parameters)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_frozen_parameters_get_no_gradient() -> None:
    model = Two(lambda m, x: m.b(m.a(x))).train()
    model.a.requires_grad_(False)
    program = capture(model, (torch.randn(3, 4),))
    (result,) = program.run([torch.randn(3, 4)])
    result.sum().backward()
    assert model.a.weight.grad is None and model.b.weight.grad is not None


def test_reentrant_checkpoints_train_and_are_reported() -> None:
    model = Two(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=True))).train()
    example = torch.randn(3, 4, requires_grad=True)
    program = capture(model, (example,))
    (result,) = program.run([example])
    found = gradients(result, list(model.parameters()))
    wanted = gradients(model.b(model.a(example)), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert any("checkpointing" in note for note in program.notes)


def test_a_training_batch_norm_trains() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    example = torch.randn(2, 3, 8, 8)
    program = capture(model, (example,))
    found = gradients(program.run([example])[-1:], list(model.parameters()))
    wanted = gradients(model(example), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Straight(torch.autograd.Function):
    """Rounds, and passes the gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def custom_backward(m: Two, x: Tensor) -> Tensor:
    return Straight.apply(m.a(x))


def gradient_hook(m: Two, x: Tensor) -> Tensor:
    y = m.a(x)
    y.register_hook(lambda g: g * 2)
    return y


def inner_backward(m: Two, x: Tensor) -> Tensor:
    m.a(x).sum().backward()
    return m.b(x)


def unseen_write(m: Two, x: Tensor) -> Tensor:
    y = m.a(x)
    with torch.no_grad():
        y[0].mul_(2)
    return y


def unseen_write_through_data(m: Two, x: Tensor) -> Tensor:
    y = m.a(x)
    y.data.mul_(2)
    return y


LOST = {
    custom_backward: "Straight",
    gradient_hook: "gradient hook",
    inner_backward: "backward pass inside forward",
    unseen_write: "does not see it",
    unseen_write_through_data: "does not see it",
}


@pytest.mark.parametrize("function", LOST)
def test_what_would_lose_gradients_is_refused_for_training(function: Any) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Two(function).train(), (torch.randn(3, 4),))
    assert LOST[function] in caught.value.what
    assert f"{__file__}:" in str(caught.value.where) and caught.value.fix


@pytest.mark.parametrize("function", [custom_backward, unseen_write])
def test_in_eval_mode_it_is_captured_with_a_note(function: Any) -> None:
    model, example = Two(function).eval(), torch.randn(3, 4)
    program = capture(model, (example,))
    assert torch.equal(program.run([example])[0], model(example))
    assert any(__file__ in note for note in program.notes)


def test_backward_hooks_of_modules_are_refused_for_training() -> None:
    model = Two(lambda m, x: m.a(x)).train()
    model.a.register_full_backward_hook(lambda _m, inner, _outer: inner)
    with pytest.raises(CaptureError, match="backward hook of Linear"):
        capture(model, (torch.randn(3, 4),))
