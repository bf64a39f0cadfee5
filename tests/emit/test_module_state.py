"""State of the emitted module: what it writes, what it shares, what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import ExportError, GraphoptError


def optimized(model: nn.Module, *args: Tensor, **options: Any) -> Any:
    return graphopt.compile(model, example_inputs=args, measure=False, **options)


class Kept(nn.Module):
    """A function of itself and the inputs, with two buffers."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("a", torch.zeros(3))
        self.register_buffer("b", torch.ones(3))

    def forward(self, *given: Tensor) -> Any:
        return self.function(self, *given)


def difference(net: Any, x: Tensor) -> Tensor:
    out = x - net.a
    net.a.copy_(x)
    return out


def recurrent(net: Any, x: Tensor) -> Tensor:
    state = torch.tanh(x + net.a)
    net.a.copy_(state)
    return state


def swapped(net: Any, x: Tensor) -> Tensor:
    kept = net.a.clone()
    net.a.copy_(net.b)
    net.b.copy_(kept)
    return x + net.a


def shifted(net: Any, x: Tensor) -> Tensor:
    net.b.copy_(net.a)
    net.a.copy_(x)
    return x + net.b


def replaced(net: Any, x: Tensor) -> Tensor:
    old = net.a
    net.a = net.a + x
    return old * 1 + 0 * net.a


def returned(net: Any, x: Tensor) -> Tensor:
    return net.a.add_(x)


STATEFUL = [difference, recurrent, swapped, shifted, replaced, returned]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("passes", ["exact", []])
@pytest.mark.parametrize("function", STATEFUL)
def test_calls_in_a_row_leave_results_and_buffers_as_eager_does(
    function: Callable[..., Any], passes: Any, grad: bool, training: bool
) -> None:
    model = Kept(function).train(training)
    twin = copy.deepcopy(model)
    fast = optimized(model, torch.randn(3), passes=passes)
    frame, ours, theirs = torch.empty(3), [], []
    with torch.set_grad_enabled(grad):
        for step in range(3):
            frame.fill_(step + 1.0)  # the caller refills one tensor
            ours.append(fast(frame))
            theirs.append(twin(frame))
            torch.testing.assert_close(ours, theirs)
    for name in ("a", "b"):
        torch.testing.assert_close(dict(fast.named_buffers())[name], getattr(twin, name))


def test_the_original_sees_the_statistics_that_training_updates() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).train()
    twin, x = copy.deepcopy(model), torch.randn(8, 4)
    fast = optimized(model, x)
    for _ in range(3):
        for net in (fast, twin):
            net(x).square().sum().backward()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))
    torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad)


def test_a_buffer_that_is_read_before_it_is_written_can_be_differentiated_through() -> None:
    class Decayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("mean", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x) * self.mean.clone()
            self.mean.mul_(0.5)
            return y

    model = Decayed().train()
    twin, x = copy.deepcopy(model), torch.randn(2, 3)
    fast = optimized(model, x)
    sums = [(net(x) + net(x)).sum() for net in (fast, twin)]
    for total in sums:
        total.backward()
    torch.testing.assert_close(model.linear.weight.grad, twin.linear.weight.grad)
    torch.testing.assert_close(model.mean, torch.full((3,), 0.25))


def test_inputs_that_share_memory_with_a_written_one_are_refused() -> None:
    model = Kept(lambda _, a, b: a.add_(1) * b).eval()
    fast = optimized(model, torch.randn(3), torch.randn(3))
    x = torch.randn(6)
    with pytest.raises(GraphoptError, match="shares memory with another input"):
        fast(x[:3], x[1:4])
    ours, theirs = x.clone(), x.clone()
    torch.testing.assert_close(fast(ours[:3], ours[3:]), model(theirs[:3], theirs[3:]))
    torch.testing.assert_close(ours, theirs)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("gate", torch.tensor(1.0))
        self.temperature = torch.tensor(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.gate / self.temperature


@pytest.mark.parametrize(("name", "training"), [("gate", False), ("temperature", True)])
def test_a_number_that_a_rewrite_read_may_not_change_unseen(name: str, training: bool) -> None:
    model, x = Gated().train(training), torch.randn(2, 3)
    fast = optimized(model, x)
    assert "TimesOne" in {a.rule for a in fast.report.applied}
    torch.testing.assert_close(fast(x), model(x))
    getattr(model, name).fill_(2.0)
    with pytest.raises(GraphoptError, match=f"{name} was written after it was folded or read"):
        fast(x)


def test_a_number_that_no_rewrite_read_may_change() -> None:
    model, x = Gated().eval(), torch.randn(2, 3)
    model.gate.fill_(3.0)
    fast = optimized(model, x)
    model.gate.fill_(2.0)
    torch.testing.assert_close(fast(x), model(x))


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)
    ).eval()


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "data replaced": lambda m: setattr(m[0].weight, "data", m[0].weight.data + 1),
    "statistics updated": lambda m: m.train()(torch.randn(4, 1, 2, 2)) is m.eval(),
    "loaded": lambda m: m.load_state_dict(normed().state_dict()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_folded_may_not_change_unseen(name: str) -> None:
    model, x = normed(), torch.randn(2, 1, 2, 2)
    fast = optimized(model, x)
    fast(x)
    CHANGES[name](model)
    with pytest.raises(GraphoptError, match="was written after it was folded"):
        fast(x)


def test_in_eval_mode_gradients_reach_inputs_and_no_weight() -> None:
    model, x = normed(), torch.randn(2, 1, 2, 2)
    fast = optimized(model, x)
    assert not fast(x).requires_grad
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast(ours).sin().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    model(theirs).sin().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.half, lambda m: m.to("meta")])
def test_neither_dtype_nor_device_change_and_the_original_is_left_alone(change: Any) -> None:
    model, x = normed(), torch.randn(2, 1, 2, 2)
    fast, before = optimized(model, x), model(x)
    with pytest.raises(GraphoptError, match="convert or move the original"):
        change(fast)
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(fast.float().cpu()(x), before, rtol=1e-5, atol=1e-6)


def test_an_empty_example_is_told_and_crashes_nothing() -> None:
    fast = optimized(normed(), torch.randn(0, 1, 2, 2))
    assert any("the example inputs are empty" in note for note in fast.report.notes)
    assert fast(torch.randn(0, 1, 2, 2)).shape == (0, 3)


def test_an_onnx_file_keeps_no_state(tmp_path: Any) -> None:
    fast = optimized(Kept(recurrent).eval(), torch.randn(3))
    with pytest.raises(ExportError, match="updates its buffer 'a' on every call"):
        graphopt.export_onnx(fast, tmp_path / "state.onnx")
    assert not list(tmp_path.iterdir())


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v


def test_recognised_attention_can_be_the_output_of_an_onnx_file(tmp_path: Any) -> None:
    fast = optimized(Attending().eval(), torch.randn(4, 6, 16))
    assert "RecognizeAttention" in {a.rule for a in fast.report.applied}
    assert graphopt.export_onnx(fast, tmp_path / "attention.onnx", measure=False).error < 1e-5


def test_a_module_can_be_pickled_and_copied(tmp_path: Any) -> None:
    model, x = normed(), torch.randn(2, 1, 2, 2)
    fast = optimized(model, x)
    torch.save(fast, tmp_path / "module.pt")
    twins = [
        torch.load(tmp_path / "module.pt", weights_only=False),
        pickle.loads(pickle.dumps(fast)),
        copy.deepcopy(fast),
        copy.copy(fast),
    ]
    for twin in twins:
        torch.testing.assert_close(twin(x), fast(x))
        assert twin.report.verified and twin.state_dict().keys() == fast.state_dict().keys()
    with torch.no_grad():
        model[0].weight.mul_(2)
    for twin in twins[:3]:
        twin(x)  # no longer tied to the original
