"""Samples through a program together: the same values as one by one, and little memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.calibration import Statistics, Stream
from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.program import Program

aten = torch.ops.aten


class Tower(nn.Module):
    """Residual layers on tokens."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = x + layer(x.sin()).relu()
        return x


def captured(depth: int = 3) -> Program:
    torch.manual_seed(0)
    dynamic = ({1: torch.export.Dim.DYNAMIC},)
    return capture(Tower(depth).eval(), (torch.tensor([[1, 2, 3]]),), dynamic_shapes=dynamic)


def linears(program: Program) -> list[Any]:
    return program.graph.find_nodes(op="call_function", target=aten.linear.default)


SAMPLES = [[torch.tensor([[1, 2, 3, 4]])], [torch.tensor([[5, 6]])]]


def test_values_are_those_of_single_runs() -> None:
    program, seen = captured(), []
    products = linears(program)
    stream = Stream(program, SAMPLES, products)
    for product in products:
        stream.advance(product)
        seen.append(list(stream.given(product.args[0])))
    for index, (tokens,) in enumerate(SAMPLES):
        x = program.state["table.weight"][tokens]
        for layer in range(3):
            assert torch.allclose(seen[layer][index], x.sin())
            weight, bias = (program.state[f"layers.{layer}.{n}"] for n in ("weight", "bias"))
            x = x + torch.nn.functional.linear(x.sin(), weight, bias).relu()


def test_changed_weights_are_what_later_nodes_see() -> None:
    program = captured()
    first, second, third = linears(program)
    stream = Stream(program, SAMPLES, [first, second, third])
    stream.advance(first)
    stream.weight(first.args[1], torch.zeros(8, 8))
    stream.replace(second, lambda x, _weight, _bias: x * 0 - 1)
    stream.advance(third)
    for index, (tokens,) in enumerate(SAMPLES):
        bias = program.state["layers.0.bias"]
        x = program.state["table.weight"][tokens] + bias.relu()  # and the second adds nothing
        assert torch.allclose(list(stream.given(third.args[0]))[index], x.sin())
    assert program.state["layers.0.weight"].abs().sum() > 0


def test_only_what_is_still_read_is_held() -> None:
    program = captured(6)
    products = linears(program)
    stream = Stream(program, SAMPLES, products)
    held, refs = [], []
    for product in products:
        stream.advance(product)
        held.append(max(len(values) for values in stream.values))
        refs.append(weakref.ref(stream.values[0][product.args[0]]))
        gc.collect()
        assert [r() is not None for r in refs] == [False] * (len(refs) - 1) + [True]
    assert max(held) <= 2


def test_nothing_behind_the_last_node_runs() -> None:
    program = captured()
    first = linears(program)[0]
    stream = Stream(program, SAMPLES, [first])
    assert stream.nodes[-1] is first
    assert all(aten.relu.default is not n.target for n in stream.nodes)


def test_a_sample_that_the_model_fails_on_is_named() -> None:
    program = captured()
    stream = Stream(program, [*SAMPLES, [torch.tensor([[99]])]], linears(program))
    with pytest.raises(GraphoptError, match=r"fails on these inputs: IndexError") as caught:
        stream.advance(linears(program)[0])
    assert caught.value.where == "calibration[2]"


def test_sums() -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 5, 8), torch.randn(3, 8)]
    found = Statistics.of(given)
    rows = torch.cat([g.reshape(-1, 8) for g in given])
    assert found.rows == 13
    torch.testing.assert_close(found.moment, rows.t() @ rows)
    torch.testing.assert_close(found.magnitude, rows.abs().sum(0))
    torch.testing.assert_close(found.largest, rows.abs().amax(0))
    counted = Statistics.of(given, [torch.full((2, 5), 2.0), torch.zeros(3)])
    torch.testing.assert_close(counted.moment, 2 * rows[:10].t() @ rows[:10])
    with pytest.raises(ValueError, match=r"calibration\[1\] gives NaN"):
        Statistics.of([given[0], given[1] / 0])
    with pytest.raises(ValueError, match="no calibration inputs"):
        Statistics.of([])
