"""Dynamo graphs under autocast and inference mode, and graphs that cannot be compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphopt
from graphopt import backend as backend_module
from graphopt.backend import Backend
from graphopt.errors import CaptureError, VerificationError
from graphopt.recipe import Options

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Net(nn.Module):
    def __init__(self, function=None):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def region_and_cast(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.a(m.norm(x)) * m.b(x)
    return y.float() + x


def same_layer_inside_and_outside(m, x):
    z = m.a(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.a(x)
    return y.float() * z


def nested(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.a(x)
        with torch.autocast("cpu", enabled=False):
            z = m.b(y.float())
    return z


REGIONS = [region_and_cast, same_layer_inside_and_outside, nested]


def outputs_and_gradients(net, x):
    x = x.detach().clone().requires_grad_()
    out = net(x)
    out.float().sin().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("function", REGIONS, ids=lambda f: f.__name__)
def test_graphs_with_autocast_regions_are_left_to_eager_mode(function):
    model = Net(function)
    eager = copy.deepcopy(model)
    fast = graphopt.compile(model, measure=False)
    x = torch.randn(4, 8)
    wanted, found = outputs_and_gradients(eager, x), outputs_and_gradients(fast, x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert found[0].dtype is wanted[0].dtype
    (report,) = fast.reports
    assert "region under torch.autocast" in report.notes[0] and __file__ in report.notes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", REGIONS[:2], ids=lambda f: f.__name__)
def test_autocast_regions_ahead_of_time(function, dtype):
    """Parameters get the very gradients; an input that is cast twice is summed in float32."""
    model = Net(function).train().to(dtype)
    eager = copy.deepcopy(model)
    x = torch.randn(4, 8, dtype=dtype)
    fast = graphopt.compile(model, example_inputs=(x,), measure=False, passes="none")
    wanted, found = outputs_and_gradients(eager, x), outputs_and_gradients(fast, x)
    assert found[0].dtype is wanted[0].dtype
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], wanted[1], rtol=2e-2, atol=2e-2)
    parameters = dict(model.named_parameters())
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=0, atol=0)


@pytest.mark.parametrize("function", REGIONS, ids=lambda f: f.__name__)
def test_autocast_regions_ahead_of_time_in_eval_mode(function):
    model, x = Net(function).eval(), torch.randn(4, 8)
    fast = graphopt.compile(model, example_inputs=(x,), measure=False)
    y = torch.randn(4, 8)
    assert fast(y).dtype is model(y).dtype
    torch.testing.assert_close(fast(y), model(y), rtol=1e-2, atol=1e-2)


def test_autocast_around_the_call():
    model = Net(lambda m, x: m.b(m.norm(m.a(x)).relu()).float() * x)
    eager = copy.deepcopy(model)
    fast = graphopt.compile(model, measure=False)
    x = torch.randn(4, 8)
    for dtype in (torch.bfloat16, torch.float16, None):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            torch.testing.assert_close(fast(x), eager(x))
    assert fast.reports[0].verified


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.zeros(4))
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x):
        self.n.add_(1)
        return (x * self.w * self.n).sum()


def test_inference_mode_first_and_training_afterwards():
    model = Counting().train()
    eager = copy.deepcopy(model)
    fast = graphopt.compile(model, measure=False)
    x = torch.randn(4)
    for net in (eager, fast):
        with torch.inference_mode():
            net(torch.randn(4))
        net(x).backward()
    torch.testing.assert_close(model.w.grad, eager.w.grad)
    torch.testing.assert_close(model.n, eager.n)
    assert [r.verified for r in fast.reports] == [True, True]


def failing(*_arguments):
    raise ZeroDivisionError("an unlucky graph\nwith details")


@pytest.mark.parametrize("name", ["program_from_dynamo", "memory_of", "rewrite_program", "Runner"])
def test_whatever_fails_leaves_the_graph_to_eager_mode(name, monkeypatch):
    monkeypatch.setattr(backend_module, name, failing)
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    fast = graphopt.compile(layer)
    torch.testing.assert_close(fast(x), layer(x))
    (report,) = fast.reports
    assert report.notes == ["left as it is: ZeroDivisionError: an unlucky graph"]


def test_strict_raises_what_fails(monkeypatch):
    monkeypatch.setattr(backend_module, "rewrite_program", failing)
    with pytest.raises((ZeroDivisionError, torch._dynamo.exc.BackendCompilerFailed), match="lucky"):
        graphopt.compile(nn.Linear(4, 4), strict=True)(torch.randn(2, 4))


def test_what_does_not_verify_runs_as_captured_and_is_an_error_when_strict(monkeypatch):
    honest = backend_module.rewrite_program

    def unverified(program, options):
        optimized, report = honest(program, options)
        report.verified = False
        return optimized, report

    monkeypatch.setattr(backend_module, "rewrite_program", unverified)
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    fast = torch.compile(layer, backend=(kept := Backend()))
    torch.testing.assert_close(fast(x), layer(x))
    assert "does not verify; the original graph runs" in kept.reports[0].notes[-1]
    torch._dynamo.reset()
    errors = (VerificationError, CaptureError, torch._dynamo.exc.BackendCompilerFailed)
    with pytest.raises(errors, match="does not verify"):
        torch.compile(layer, backend=Backend(Options(strict=True)))(x)
