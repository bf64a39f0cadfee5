"""What Inductor is given in place of some operators, and where they stay as they are."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.emit.gelu import quick_gelu
from graphopt.emit.spelled import spelled
from graphopt.kernels.quantized import integers
from graphopt.kernels.quantized.operator import quantized_linear
from graphopt.kernels.quantized.spelled import int8_linear
from graphopt.passes import QuantizeMatmul


class Model(nn.Module):
    def __init__(self, width: int = 32, approximate: str = "none") -> None:
        super().__init__()
        self.enter, self.gelu = nn.Linear(width, 64), nn.GELU(approximate)
        self.leave = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.gelu(self.enter(x))).sum(-1)


def _graph(model: nn.Module, x: Tensor, *passes: Any) -> fx.GraphModule:
    """The optimized graph of the model."""
    made = graphopt.compile(model.eval(), example_inputs=(x,), passes=list(passes), measure=False)
    assert isinstance(made._graph.code, fx.GraphModule)
    return made._graph.code


def _count(module: fx.GraphModule, target: Any) -> int:
    return len(module.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize(
    ("approximate", "dtype", "count"),
    [("none", torch.float32, 1), ("tanh", torch.float32, 0), ("none", torch.bfloat16, 0)],
)
def test_only_exact_gelus_of_float32_are(approximate: str, dtype: torch.dtype, count: int) -> None:
    module = _graph(Model(approximate=approximate).to(dtype), torch.randn(3, 32, dtype=dtype))
    assert _count(spelled(module), quick_gelu) == count
    assert _count(module, quick_gelu) == 0, "the graph itself stays as it is"


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2),
        ({"group_size": 16}, 0),
        ({"symmetric": False}, 0),
        ({"bits": 4}, 0),
        ({"activations": None}, 0),
        ({"dtype": "fp8"}, 0),
    ],
)
def test_only_int8_of_whole_rows_is(options: dict[str, Any], count: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 32)
    module = _graph(Model(), x, QuantizeMatmul(tolerance=1.0, **options))
    assert _count(module, quantized_linear) == 2
    made = spelled(module)
    assert _count(made, int8_linear) == count
    assert _count(made, quantized_linear) == 2 - count


def test_not_where_the_quick_product_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _graph(Model(), torch.randn(3, 32), QuantizeMatmul())
    monkeypatch.setattr(integers, "is_exact", lambda _path: False)
    assert _count(spelled(module), int8_linear) == 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_is_given_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given, compile_ = [], torch.compile

    def watched(module: Any, **options: Any) -> Any:
        given.append(module)
        return compile_(module, **options)

    monkeypatch.setattr(torch, "compile", watched)
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(4, 32)
    options = {"example_inputs": (x,), "passes": [QuantizeMatmul()], "measure": False}
    fast = graphopt.compile(model, target="inductor", **options)
    assert not any("Inductor" in note for note in fast.report.notes)
    assert all(_count(module, quick_gelu) and _count(module, int8_linear) for module in given)
    wanted = graphopt.compile(model, **options)(x)
    assert (fast(x) - wanted).norm() < 1e-4 * wanted.norm()
