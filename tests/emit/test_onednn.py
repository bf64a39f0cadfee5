"""Linear layers and activations as one kernel, only where nobody differentiates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.capture import capture
from graphopt.emit import onednn
from graphopt.emit.onednn import fits, fused
from graphopt.verify.timing import Pace

POINTWISE = torch.ops.mkldnn._linear_pointwise.default

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


class Layer(nn.Module):
    def __init__(self, function: Callable[..., Any], bias: bool = True) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(8, 12, bias=bias), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.linear(x))


@pytest.fixture(autouse=True)
def _pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "interleaved", lambda *_, **__: Pace(2.0, 1.0))


def quick(model: nn.Module, x: Tensor, **options: Any) -> Any:
    return graphopt.compile(model, example_inputs=(x,), **options)


ACTIVATIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "none": (lambda y: y, 1),
    "relu": (F.relu, 1),
    "gelu": (F.gelu, 1),
    "gelu, tanh": (lambda y: F.gelu(y, approximate="tanh"), 1),
    "silu": (F.silu, 1),
    "sigmoid": (torch.sigmoid, 1),
    "tanh": (torch.tanh, 1),
    "hardswish": (F.hardswish, 1),
    "read twice": (lambda y: F.relu(y) + y, 3),
    "returned": (lambda y: (F.relu(y), y), 2),
    "another": (F.elu, 2),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_fused_graph_gives_the_same(name: str, bias: bool) -> None:
    function, count = ACTIVATIONS[name]
    model = Layer(function, bias).eval()
    wide = copy.deepcopy(model).double()
    axes = ({0: "batch", 1: "seq"},)
    fast = quick(model, torch.randn(3, 5, 8), dynamic_shapes=axes)
    calls = [n for n in fast._graph.fast.graph.nodes if n.op == "call_function"]
    assert [n.target for n in calls].count(POINTWISE) == 1
    assert sum("aten" in str(n.target) for n in calls) == count - 1
    for x in (torch.randn(3, 5, 8), torch.randn(1, 1, 8), torch.randn(5, 8, 4).transpose(1, 2)):
        x = 3 * x
        with torch.no_grad():
            found, wanted = fast(x), wide(x.double())
        for ours, theirs in zip(_tuple(found), _tuple(wanted), strict=True):
            torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def test_where_gradients_are_asked_for_the_plain_graph_runs() -> None:
    model = Layer(F.gelu).eval()
    x = torch.randn(4, 8, requires_grad=True)
    fast = quick(model, x.detach())
    assert fast._graph.fast is not None
    (ours,) = torch.autograd.grad(fast(x).sin().sum(), x)
    (theirs,) = torch.autograd.grad(model(x).sin().sum(), x)
    torch.testing.assert_close(ours, theirs)
    mapped = torch.func.grad(lambda v: fast(v).sin().sum())(x.detach())
    torch.testing.assert_close(mapped, theirs)
    rows = torch.func.vmap(fast)(torch.stack([x.detach(), -x.detach()]))
    torch.testing.assert_close(rows, model(torch.stack([x, -x])), rtol=1e-5, atol=1e-6)


def test_autocast_is_honoured() -> None:
    model, x = Layer(torch.relu).eval(), torch.randn(4, 8)
    fast = quick(model, x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fast(x), model(x)
    assert ours.dtype is theirs.dtype is torch.bfloat16
    torch.testing.assert_close(ours, theirs)


def test_weights_that_change_are_seen() -> None:
    model, x = Layer(torch.relu).eval(), torch.randn(4, 8)
    fast = quick(model, x)
    with torch.no_grad():
        model.linear.weight.mul_(2)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_copies_and_files_give_the_same(tmp_path: Any) -> None:
    model, x = Layer(F.gelu).eval(), torch.randn(4, 8)
    fast = quick(model, x)
    assert fast.state_dict().keys() == model.state_dict().keys()
    graphopt.save(fast, tmp_path / "m.pt2")
    for twin in (copy.deepcopy(fast), graphopt.load(tmp_path / "m.pt2")):
        with torch.no_grad():
            torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(onednn.ACTIVATIONS, torch.ops.aten.relu.default, ("tanh", ""))
    model, x = Layer(torch.relu).eval(), torch.randn(16, 8)
    fast = quick(model, x)
    assert fast._graph.fast is None
    assert any("not fused in oneDNN: error above the bound" in n for n in fast.report.notes)
    torch.testing.assert_close(fast(x), model(x))


def test_what_is_not_faster_or_not_timed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Layer(torch.relu).eval(), torch.randn(4, 8)
    assert quick(model, x, measure=False)._graph.fast is None
    monkeypatch.setattr(onednn, "interleaved", lambda *_, **__: Pace(1.0, 0.99))
    assert quick(model, x)._graph.fast is None


def test_only_constant_weights_in_float32() -> None:
    x = torch.randn(4, 8)
    model = Layer(torch.relu)
    assert fits(capture(model.eval(), (x,)))
    assert not fits(capture(model.train(), (x,)))
    assert not fits(capture(copy.deepcopy(model).eval().double(), (x.double(),)))
    assert not fits(capture(copy.deepcopy(model).eval().bfloat16(), (x.bfloat16(),)))


def test_a_vector_is_left_to_the_plain_operator() -> None:
    program = capture(Layer(torch.relu).eval(), (torch.randn(8),))
    graph = fused(program.graph_module).graph
    assert not graph.find_nodes(op="call_function", target=POINTWISE)
