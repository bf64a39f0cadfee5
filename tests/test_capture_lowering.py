"""The short way into the dialect gives what torch's own decomposition gives."""

from __future__ import annotations

from collections.abc import Callable
from operator import mul

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt import capture_exported
from graphopt.capture import capture
from graphopt.capture_lowering import lower_in_place
from graphopt.program import Program

aten = torch.ops.aten
Function = Callable[[Tensor], object]

LOWERED: dict[str, Function] = {
    "reshape that views": lambda x: x.reshape(x.shape[0], -1),
    "reshape that copies": lambda x: x.transpose(1, 2).reshape(x.shape[0], -1, 2),
    "reshape of everything": lambda x: x.reshape(-1),
    "flatten from an axis": lambda x: x.flatten(1),
    "flatten the dynamic axis": lambda x: x.flatten(0, 1),
    "flatten one axis": lambda x: x.flatten(1, 1) + 1,
    "flatten a scalar": lambda x: x.sum().flatten(),
    "flatten a transposed tensor": lambda x: x.transpose(1, 2).flatten(1),
    "contiguous copy": lambda x: x.transpose(1, 2).contiguous() + 1,
    "contiguous already": lambda x: (x * 2).contiguous() + 1,
    "cast": lambda x: x.to(torch.float64),
    "cast to what it is": lambda x: x.to(torch.float32) + 1,
    "forced copy": lambda x: x.to(torch.float32, copy=True) + 1,
    "cast like another": lambda x: x.to(torch.zeros(1, dtype=torch.float64)),
    "move to where it is": lambda x: x.to("cpu") + 1,
    "chunks": lambda x: x.chunk(4, -1),
    "chunks that do not divide": lambda x: x.chunk(4, 1),
    "dropout off": lambda x: F.dropout(x, 0.5, False) + 1,
    "dropout of nothing": lambda x: F.dropout(x, 0.0, True) + 1,
    "dropout on": lambda x: F.dropout(x, 0.5, True),
    "batch norm": lambda x: F.batch_norm(x, torch.ones(5), torch.ones(5)),
    "a literal tensor": lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    "no gradients": lambda x: x * torch.no_grad()(lambda y: y.sin().reshape(-1).sum())(x),
}
LEFT_TO_TORCH: dict[str, Function] = {
    "in place": lambda x: (x * 2).add_(1).reshape(-1),
    "training batch norm": lambda x: F.batch_norm(x, torch.ones(5), torch.ones(5), training=True),
    "autocast": lambda x: torch.autocast("cpu", torch.bfloat16)(lambda y: y @ y.mT)(x),
    "vmap": lambda x: torch.vmap(lambda y: y.relu().reshape(-1))(x),
    "channels last": lambda x: x[None].contiguous(memory_format=torch.channels_last) + 1,
}


class Calls(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def both(
    function: Function, monkeypatch: pytest.MonkeyPatch
) -> tuple[bool, Program, Program, Tensor]:
    """Whether the short way was taken, its program, torch's program, and an example."""
    taken: list[bool] = []

    def seen(graph: torch.fx.Graph) -> bool:
        taken.append(lower_in_place(graph))
        return taken[-1]

    example, axes = torch.randn(3, 5, 6), {"x": {0: "n"}}
    monkeypatch.setattr(capture_exported, "lower_in_place", seen)
    short = capture(Calls(function).eval(), (example,), dynamic_shapes=axes)
    monkeypatch.setattr(capture_exported, "lower_in_place", lambda _graph: False)
    long = capture(Calls(function).eval(), (example,), dynamic_shapes=axes)
    return taken[0], short, long, example


def operators(program: Program) -> list[str]:
    noise = (aten._assert_tensor_metadata.default, aten.clone.default, aten.sym_size.int, mul)
    return [str(n.target) for n in program.graph.nodes if n.target not in noise and n.op[0] == "c"]


@pytest.mark.parametrize("name", LOWERED)
def test_both_ways_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, short, long, example = both(LOWERED[name], monkeypatch)
    assert taken and sorted(set(operators(short))) == sorted(set(operators(long)))
    for given in (example, torch.randn(7, 5, 6)):
        results = []
        for program in (short, long):
            torch.manual_seed(1)
            leaf = given.clone().requires_grad_()
            values = program.run([leaf])
            loss = sum(v.double().square().sum() for v in values)
            results.append([*values, *torch.autograd.grad(loss, leaf)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", LOWERED)
def test_shapes_and_strides_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, short, _, example = both(LOWERED[name], monkeypatch)
    values = short.run([example])
    for node, value in zip(short.output_node().args[0], values, strict=True):
        fake = node.meta["val"]
        assert value.dtype == fake.dtype and value.dim() == fake.dim()
        static = [i for i, n in enumerate(fake.shape) if isinstance(n, int)]
        assert all(value.shape[i] == fake.shape[i] for i in static)


def test_contiguous_copies_where_it_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, short, _, example = both(lambda x: x.transpose(1, 2).contiguous(), monkeypatch)
    (result,) = short.run([example])
    assert taken and result.is_contiguous() and torch.equal(result, example.transpose(1, 2))


@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_what_needs_more_is_left_to_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, short, long, example = both(LEFT_TO_TORCH[name], monkeypatch)
    assert not taken and operators(short) == operators(long)
    pairs = zip(short.run([example]), long.run([example]), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_refusal_changes_nothing() -> None:
    traced = torch.export.export(
        Calls(LEFT_TO_TORCH["in place"]), (torch.randn(3, 5, 6),), strict=False
    )
    before = str(traced.graph)
    assert not lower_in_place(traced.graph) and str(traced.graph) == before
