"""Fake values of operators in a rewrite: as the capture has them, and with no demand on sizes."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from graphopt.capture import capture
from graphopt.errors import IllegalRewriteError
from graphopt.program import val
from graphopt.rewrite.builder import infer, program_fake_mode

aten = torch.ops.aten


class Fn(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


def program_of(fn, *inputs):
    """A program of inputs whose first two axes are dynamic, each on its own."""
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return capture(Fn(fn), inputs, dynamic_shapes={"args": (axes,) * len(inputs)})


def attention(x):
    heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
    return functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1)


@pytest.mark.parametrize(
    "fn",
    [
        attention,
        lambda x: functional.linear(x[:, :-1], torch.ones(5, 32)),
        lambda x: x.transpose(0, 1) @ torch.ones(32, 5),
    ],
    ids=["attention", "linear", "matmul"],
)
def test_operators_have_the_sizes_and_strides_of_the_capture(fn):
    program = program_of(fn, torch.randn(2, 7, 32))
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            fakes = fx.node.map_arg((node.args, node.kwargs), val)
            made, seen = infer(program_fake_mode(program), node.target, *fakes), val(node)
            assert str(getattr(made, "shape", made)) == str(getattr(seen, "shape", seen))
            if isinstance(seen, torch.Tensor):
                assert str(made.stride()) == str(seen.stride())


@pytest.mark.parametrize(
    ("operator", "reason"),
    [
        (aten.add.Tensor, "would demand"),
        (lambda x, y: aten.cat.default([x, y], 2), "would demand"),
        (lambda x, y: aten.view.default(x, [3, 4, 6]), "would demand"),
        (lambda x, y: aten.add.Tensor(x.transpose(0, 2), y[:, :, :5].transpose(0, 2)), "fit"),
    ],
    ids=["add", "cat", "view", "add of other widths"],
)
def test_an_operator_that_is_refused_teaches_nothing(operator, reason):
    """Not about the sizes, and not that it could be done: asked again, it is refused again."""
    inputs = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    program = program_of(lambda x, y: (x.sin(), y.sin()), *inputs)
    x, y = (val(node) for node in program.graph.find_nodes(op="placeholder"))
    mode = program_fake_mode(program)
    before = [str(guard.expr) for guard in mode.shape_env.guards]
    for _ in range(2):
        with pytest.raises(IllegalRewriteError, match=reason):
            infer(mode, operator, (x, y), {})
        assert [str(guard.expr) for guard in mode.shape_env.guards] == before
        assert len({str(n) for n in (*x.shape[:2], *y.shape[:2])}) == 4
