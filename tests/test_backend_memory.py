"""Graphs of Dynamo that write: memory stays shared, and gradients are those of eager mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphopt
from graphopt import backend as backend_module
from graphopt.backend import Backend
from graphopt.errors import CaptureError
from graphopt.recipe import Options

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

gap = torch._dynamo.graph_break


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.w = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.register_buffer("buf", torch.zeros(4))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def buffer_view(m, x):
    m.buf.add_(x)
    v = m.buf[:2]
    gap()
    v.mul_(3)
    return m.buf.sum()


def returned_buffer_view(m, x):
    m.buf.add_(x)
    return m.buf[1:]


def earlier_view(m, x):
    y = x.view(2, 2)
    x.mul_(2)
    gap()
    y.add_(1)
    return x.sum()


def written_view(m, x):
    v = x[1:]
    v.mul_(3)
    gap()
    v.add_(1)
    return x.sum()


def strided(m, x):
    x = x.view(2, 2)[:, 0]
    gap()
    x.mul_(2)
    v = x.view(2, 1)
    gap()
    v.add_(1)
    return x.sum()


def two_views_of_a_result(m, x):
    y = x * 2
    v = y[:2]
    v.mul_(3)
    gap()
    v.add_(1)
    return y.sum()


def equal_results(m, x):
    y, z = x * 2, x * 2
    gap()
    y.add_(1)
    return z


def untouched_view(m, x):
    v = x[:2]
    gap()
    v.add_(1)
    return x.sum()


def aliased_inputs(m, x):
    y = x[:2]
    gap()
    x.mul_(2)
    return y + 1


FUNCTIONS = [
    buffer_view, returned_buffer_view, earlier_view, written_view, strided,
    two_views_of_a_result, equal_results, untouched_view, aliased_inputs,
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_memory_is_shared_as_in_eager_mode(function):
    model = Net(function)
    eager = copy.deepcopy(model)
    fast = graphopt.compile(model, measure=False)
    for _ in range(2):
        given = [torch.arange(4.0) + 1 for _ in range(2)]
        results = [eager(given[0]), fast(given[1])]
        torch.testing.assert_close(results[1], results[0])
        if results[0].dim():  # what the caller writes into a result
            results[0].zero_(), results[1].zero_()
        torch.testing.assert_close(given[1], given[0])
        torch.testing.assert_close(model.buf, eager.buf)


@pytest.mark.parametrize("function", [buffer_view, earlier_view, written_view, strided])
def test_graphs_with_views_of_what_they_write_are_rewritten(function):
    fast = graphopt.compile(Net(function), measure=False)
    fast(torch.arange(4.0))
    assert any(r.verified for r in fast.reports)


def test_views_follow_dynamic_sizes():
    def function(x):
        y = x.view(2, -1)[1]
        x.mul_(2)
        gap()
        y.add_(1)
        return x * 1

    backend = Backend(Options(measure=False))
    fast = torch.compile(function, backend=backend, dynamic=True)
    for size in (4, 6, 10):
        x, y = torch.arange(float(size)), torch.arange(float(size))
        torch.testing.assert_close(fast(x), function(y))
        torch.testing.assert_close(x, y)
    assert len(backend.reports) == 2 and backend.reports[0].verified


def swapped(x, y):
    kept = y.clone()
    y.copy_(x)
    x.copy_(kept)
    return x + 0


def handed_on(x, y):
    total = x + y
    y.copy_(x)
    x.zero_()
    return total


def old_value(x, y):
    kept = x.clone()
    x.add_(y)
    return kept[1:]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("function", [swapped, handed_on, old_value])
def test_old_values_survive_the_write(function, gradients):
    fast = torch.compile(function, backend=Backend(Options(measure=False)))
    with torch.set_grad_enabled(gradients):
        pairs = [[torch.arange(4.0), torch.full((4,), 7.0)] for _ in range(2)]
        torch.testing.assert_close(fast(*pairs[0]), function(*pairs[1]))
    torch.testing.assert_close(pairs[0], pairs[1])


def test_results_that_would_no_longer_share_memory_are_left_to_eager_mode(monkeypatch):
    def function(x):
        y = x * 2
        return y, y[1:]

    def apart(*_arguments):
        return [1, 2]

    kept = Backend(Options(measure=False))
    torch.compile(function, backend=kept)(torch.ones(4))
    assert kept.reports[0].verified
    torch._dynamo.reset()
    monkeypatch.setattr(backend_module, "results_memory", apart)
    left = Backend(Options(measure=False))
    torch.compile(function, backend=left)(torch.ones(4))
    assert "results share memory" in left.reports[0].notes[0]


def test_inputs_that_share_memory_only_later_are_seen():
    def function(x, y):
        x.mul_(2)
        return y + 1

    fast = torch.compile(function, backend=Backend(Options(measure=False)))
    torch.testing.assert_close(fast(torch.ones(4), torch.ones(4)), torch.full((4,), 2.0))
    x = torch.ones(4)
    torch.testing.assert_close(fast(x, x[:]), torch.full((4,), 3.0))


def written_between_graphs(m, x):
    y = m.linear(x)
    gap()
    y.mul_(m.w * 2)
    gap()
    return (y * y).sum()


def cleared_between_graphs(m, x):
    y = m.linear(x)
    gap()
    y.copy_(x)
    gap()
    return (y * m.w).sum()


def written_from_a_parameter(m, x):
    y = x * 2
    gap()
    y.copy_(m.w)
    gap()
    return (m.linear(x) * y).sum()


def hidden_write(m, x):
    y = m.linear(x)
    with torch.no_grad():
        y.mul_(2)
    return (y * m.w).sum()


def hidden_by_detach(m, x):
    y = m.linear(x)
    y.detach()[1:].mul_(2)
    return (y * m.w).sum()


def hidden_after_a_slice_was_set(m, x):
    y = torch.zeros_like(x)
    y[1:] = m.linear(x)[1:]
    with torch.no_grad():
        y.mul_(2)
    return (y * m.w).sum()


def seen_writes(m, x):
    y = m.linear(x)
    y.mul_(2)
    with torch.no_grad():
        m.buf.copy_(y * 0.5)
        z = m.linear(x)
        z.add_(1)
    return (y * m.w * z).sum() + m.buf.sum()


SEEN = [seen_writes, written_between_graphs, cleared_between_graphs, written_from_a_parameter]
HIDDEN = [hidden_write, hidden_by_detach, hidden_after_a_slice_was_set]


@pytest.mark.parametrize("function", [*HIDDEN, *SEEN], ids=lambda f: f.__name__)
def test_gradients_of_written_values_are_those_of_eager_mode(function):
    model = Net(function).train()
    eager = copy.deepcopy(model)
    fast = graphopt.compile(model, measure=False)
    x = torch.randn(4)
    for net in (eager, fast):
        net(x).backward()
    for (name, a), b in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        torch.testing.assert_close(b.grad, a.grad, msg=name)
    notes = [n for r in fast.reports for n in r.notes]
    assert any("autograd does not see it" in n and __file__ in n for n in notes) == (
        function in HIDDEN
    )


def test_a_write_under_an_outer_no_grad_hides_nothing():
    model = Net(hidden_write)
    fast = graphopt.compile(model, measure=False)
    with torch.no_grad():
        x = torch.randn(4)
        torch.testing.assert_close(fast(x), model(x))
    assert fast.reports[0].verified and not fast.reports[0].notes


def test_strict_raises_where_a_graph_is_left_as_it_is():
    fast = torch.compile(Net(hidden_write), backend=Backend(Options(measure=False, strict=True)))
    with pytest.raises((CaptureError, torch._dynamo.exc.BackendCompilerFailed), match="autograd"):
        fast(torch.randn(4))
