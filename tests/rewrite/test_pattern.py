"""What patterns match, what they must not, and what the trace says about near misses."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn

import graphopt
from graphopt.capture import capture
from graphopt.rewrite import Matcher, either, num, op, var

aten = torch.ops.aten


class Fn(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


def program_of(fn, *inputs):
    return capture(Fn(fn).eval(), inputs or (torch.randn(2, 4),))


def matches(program, *patterns):
    matcher = Matcher(program)
    return [m for n in program.graph.nodes for m in matcher.at(patterns, n)]


def test_swapped_operands_of_commutative_ops_match():
    pattern = op(aten.add.Tensor, op(aten.sin.default, "x"), op(aten.cos.default, "x"))
    assert matches(program_of(lambda x: x.sin() + x.cos()), pattern)
    assert matches(program_of(lambda x: x.cos() + x.sin()), pattern)
    assert not matches(program_of(lambda x: x.cos() - x.sin()), pattern)


def test_commuting_is_off_where_alpha_scales_one_side():
    pattern = op(aten.add.Tensor, op(aten.sin.default, "x"), op(aten.cos.default, "x"), ...)
    assert matches(program_of(lambda x: torch.add(x.sin(), x.cos(), alpha=2)), pattern)
    assert not matches(program_of(lambda x: torch.add(x.cos(), x.sin(), alpha=2)), pattern)


def test_method_and_function_spelling_are_one():
    pattern = op(aten.mul.Tensor, "x", op(aten.sigmoid.default, "x"))
    for fn in (lambda x: x * x.sigmoid(), lambda x: torch.mul(torch.sigmoid(x), x)):
        assert matches(program_of(fn), pattern)


def test_one_name_binds_one_node():
    pattern = op(aten.mul.Tensor, "x", op(aten.sigmoid.default, "x"))
    two = program_of(lambda x, y: x * y.sigmoid(), torch.randn(2), torch.randn(2))
    assert not matches(two, pattern)


def test_literals_are_significant():
    half = op(aten.mul.Tensor, "x", num(0.5))
    assert matches(program_of(lambda x: x * 0.5), half)
    assert not matches(program_of(lambda x: x * 0.25), half)


def test_division_and_multiplication_are_told_apart():
    scaled = either(op(aten.mul.Tensor, "x", num("c")), op(aten.div.Tensor, "x", num("d")))
    (times,) = matches(program_of(lambda x: x * 0.125), scaled)
    (over,) = matches(program_of(lambda x: x / 8), scaled)
    assert times["c"] == 0.125 and "d" not in times
    assert over["d"] == 8 and "c" not in over


def test_constant_tensor_counts_as_number_only_if_it_is_one():
    pattern = op(aten.mul.Tensor, "x", num("c"))

    class Scaled(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.register_buffer("c", torch.full(shape, 3.0))

        def forward(self, x):
            return x * self.c

    (found,) = matches(capture(Scaled(()).eval(), (torch.randn(2, 4),)), pattern)
    assert found["c"] == 3.0
    assert not matches(capture(Scaled((4,)).eval(), (torch.randn(2, 4),)), pattern)


@pytest.mark.parametrize(
    ("other", "number"),
    [
        (lambda: torch.full((), 0.5), 0.5),
        (lambda: torch.full((), 2.75, dtype=torch.int64), 2.0),
        (lambda: torch.full((), 0.1, dtype=torch.float16), 0.0999755859375),
        (lambda: aten.scalar_tensor(3.0), 3.0),
        (lambda: torch.full((1,), 0.5), None),
        (lambda: torch.full((1, 1, 1), 0.5), None),
        (lambda: torch.full((2, 4), 0.5), None),
        (lambda: torch.full((), 1j), None),
        (lambda: torch.full((), True), None),
    ],
)
def test_filled_tensor_counts_as_number_only_without_axes(other, number):
    found = matches(program_of(lambda x: x * other()), op(aten.mul.Tensor, "x", num("c")))
    assert [m["c"] for m in found] == ([] if number is None else [number])


def test_complex_constant_is_no_number():
    unit = torch.tensor(1j)
    assert not matches(program_of(lambda x: x * unit), op(aten.mul.Tensor, "x", num("c")))


def test_filled_tensor_keeps_the_axes_it_lends():
    """Three axes times ``full((1, 1, 1, 1), ...)`` are four: the factor is no plain scale."""

    def attention(q, k, v):
        scores = (q * torch.full((1, 1, 1, 1), 0.5)) @ k.transpose(-1, -2)
        return torch.softmax(scores, -1) @ v

    torch.manual_seed(0)
    inputs = (torch.randn(3, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8))
    model = Fn(attention).eval()
    fast = graphopt.compile(model, example_inputs=inputs, measure=False)
    assert torch.allclose(fast(*inputs), model(*inputs), atol=1e-5)


def test_numbers_that_float32_holds_must_be_exact():
    double = torch.randn(2, 4, dtype=torch.float64)
    for near, wanted in ((1.0000001, 1), (-1.0000001, -1), (0.50000001, 0.5)):
        program = program_of(lambda x, c=near: x * c, double)
        assert not matches(program, op(aten.mul.Tensor, "x", num(wanted)))
    root = program_of(lambda x: x * 0.7071068)
    assert matches(root, op(aten.mul.Tensor, "x", num(0.5**0.5)))


def test_unmentioned_arguments_must_have_their_defaults():
    softmax = op(aten.softmax.int, "x", -1)
    assert matches(program_of(lambda x: x.softmax(-1)), softmax)
    wide = program_of(lambda x: torch.softmax(x, -1, dtype=torch.float64))
    assert not matches(wide, softmax)
    assert matches(wide, op(aten.softmax.int, "x", -1, ...))


def test_true_is_not_one():
    kept = op(aten.sum.dim_IntList, "x", [1], True)
    assert matches(program_of(lambda x: x.sum(1, keepdim=True)), kept)
    assert not matches(program_of(lambda x: x.sum(1)), kept)


def test_patterns_inside_list_arguments():
    """Back-to-back matches through the list argument of cat."""
    inner = op(aten.cat.default, [op(aten.sin.default, "x"), op(aten.cos.default, "x")], ...)
    program = program_of(lambda x: torch.cat([x.sin(), x.cos()], 1))
    (found,) = matches(program, inner)
    assert len(found.nodes) == 3
    assert not matches(program_of(lambda x: torch.cat([x.cos(), x.sin()], 1)), inner)


def test_two_outputs_share_their_variables():
    first = op(aten.sin.default, op(aten.mul.Tensor, "x", num(2)))
    second = op(aten.cos.default, "x")
    program = program_of(lambda x: ((x * 2).sin(), x.cos()))
    (found,) = matches(program, first, second)
    assert [r.target for r in found.roots] == [aten.sin.default, aten.cos.default]
    apart = program_of(lambda x, y: ((x * 2).sin(), y.cos()), torch.randn(2), torch.randn(2))
    assert not matches(apart, first, second)


def test_item_of_several_outputs():
    values = op(operator.getitem, op(aten.max.dim, "x", 1), 0)
    assert matches(program_of(lambda x: x.max(1).values), values)
    assert not matches(program_of(lambda x: x.max(1).indices), values)


def test_predicate_on_variable():
    integer = op(aten.neg.default, var("x", lambda n: not n.meta["val"].is_floating_point()))
    assert matches(program_of(lambda x: -x, torch.arange(3)), integer)
    assert not matches(program_of(lambda x: -x), integer)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: x.sin() * x.tanh(), "expected aten.sigmoid, found aten.tanh"),
        (lambda x: x.sin() * 3 * x.sigmoid(), "is"),
    ],
)
def test_trace_names_the_culprit_of_a_near_miss(fn, reason):
    pattern = op(aten.mul.Tensor, op(aten.sin.default, "x"), op(aten.sigmoid.default, "x"))
    program = program_of(fn)
    matcher = Matcher(program)
    root = next(n for n in reversed(program.graph.nodes) if n.target is aten.mul.Tensor)
    assert not list(matcher.at((pattern,), root))
    assert matcher.trace.culprit is not None
    assert matcher.trace.reason
