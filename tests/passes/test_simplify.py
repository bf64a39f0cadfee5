"""Common subexpressions and constant cones on whole models; what they must leave alone."""

from __future__ import annotations

import pytest
import torch
from counting import counted
from torch import nn
from torch.nn.utils import parametrizations

from graphopt.capture import capture
from graphopt.certify import certify
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.canonicalize.identity import Call
from graphopt.passes.simplify import EliminateCommonSubexpressions, FoldConstants
from graphopt.pipeline import Context, run_pass, state_bytes
from graphopt.program import compute_nodes

aten = torch.ops.aten


def simplified(model, args, step, *, canonical=False, **options):
    program = capture(model, args, **options)
    if canonical:
        program = run_pass(program, Canonicalize(), Context.of(program, strict=True, measure=False))
    context = Context.of(program, strict=True, measure=False)
    after = run_pass(program, step, context)
    assert certify(program, after, context, name="whole"), context.report.whole
    return program, after, context.report


def count(program, target):
    return len(program.graph.find_nodes(op="call_function", target=target))


def size(program):
    return len(list(compute_nodes(program.graph)))


def merged(function, *inputs, training=False, **options):
    step = EliminateCommonSubexpressions()
    return simplified(Call(function).train(training), inputs, step, **options)


def test_a_chain_of_equals_goes_in_one_round():
    def tower(x):
        for _ in range(20):
            x = (x + 1).sin()
        return x

    before, after, report = merged(lambda x: tower(x) * tower(x), torch.randn(3))
    assert size(before) == 81
    assert size(after) == 41
    assert len(report.applied) == 40


def test_merging_takes_linear_time():
    def calls(depth):
        def tower(x):
            for _ in range(depth):
                x = x.sin() + x.sin() * x.cos()
            return x

        program = capture(Call(tower).eval(), (torch.randn(2),))
        rule = EliminateCommonSubexpressions().rules()[0]
        found, made = counted(lambda: list(rule.find(program)))
        assert len(found) == depth
        return made

    assert calls(240) < 12 * calls(30)


def test_sizes_are_equal_where_their_expressions_are():
    axes = {0: torch.export.Dim("rows", min=2)}
    function = lambda x, y: (x.expand(x.shape[0], 4) + 1, y.view(y.shape[0], -1) * 2)  # noqa: E731
    _, after, _ = merged(
        function, torch.randn(3, 4), torch.randn(3, 4), dynamic_shapes=((axes, axes),)
    )
    assert count(after, aten.sym_size.int) == 1


def test_random_draws_stay_two():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x) - torch.rand_like(x)

    program = capture(Noise().eval(), (torch.randn(3),))
    context = Context.of(program, strict=True, measure=False)
    after = run_pass(program, EliminateCommonSubexpressions(), context)
    assert count(after, aten.rand_like.default) == 2


def test_results_of_several_values_stay_apart_when_both_are_returned():
    _, after, report = merged(lambda x: (x.sort().values, x.sort().values), torch.randn(5))
    assert count(after, aten.sort.default) == 2
    assert any("must stay two" in m.reason for m in report.missed)


def test_training_gradients_meet_in_the_merged_value():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x).tanh() * self.layer(x).tanh().exp()

    _, after, report = simplified(
        Twice().train(), (torch.randn(3, 4),), EliminateCommonSubexpressions()
    )
    assert count(after, aten.linear.default) == 1
    assert all(w.gradient_error is not None for w in report.whole)


class Net(nn.Module):
    """A convolution and a linear, reparametrised by ``wrap``."""

    def __init__(self, wrap):
        super().__init__()
        self.conv, self.linear = wrap(nn.Conv1d(4, 6, 3)), wrap(nn.Linear(6, 3))

    def forward(self, x):
        return self.linear(self.conv(x).relu().mean(-1))


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda m: parametrizations.weight_norm(m, dim=None),
        parametrizations.orthogonal,
    ],
)
def test_parametrizations_fold_in_eval_without_growing(wrap):
    x = torch.randn(2, 4, 9)
    model = Net(wrap).eval()
    want = model(x)
    before, after, _ = simplified(model, (x,), FoldConstants(), canonical=True)
    weights = {n for n in after.state if "weight" in n}
    assert weights == {"conv.weight_folded", "linear.weight_folded"}
    assert size(after) == 4
    assert state_bytes(after) <= state_bytes(before)
    (got,) = after.run([x])
    assert torch.equal(got, want)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_parametrizations_stay_where_they_train(wrap):
    before, after, report = simplified(Net(wrap).train(), (torch.randn(2, 4, 9),), FoldConstants())
    assert after is before
    assert report.applied == []


def test_a_rotary_table_of_fixed_size_is_folded_or_cut_below_what_grows():
    class Rotary(nn.Module):
        def __init__(self, length):
            super().__init__()
            self.length = length
            self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8))

        def forward(self, x):
            angles = torch.outer(torch.arange(self.length).float(), self.inv_freq)
            return x * torch.cat([angles.cos(), angles.sin()], -1)

    x = torch.randn(2, 16, 8)
    _, after, _ = simplified(Rotary(16).eval(), (x,), FoldConstants(), canonical=True)
    assert [str(n.target) for n in compute_nodes(after.graph)] == ["aten.mul.Tensor"]
    before, after, report = simplified(
        Rotary(2000).eval(), (torch.randn(1, 2000, 8),), FoldConstants(), canonical=True
    )
    assert state_bytes(after) <= state_bytes(before) + 4096
    assert any("would hold 64000 bytes" in m.reason for m in report.missed)


def test_values_that_writes_change_are_no_constants():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(3))

        def forward(self, x):
            scale = (self.steps * 2).cos()
            self.steps.add_(1)
            return x * scale

    before, after, _ = simplified(Counter().eval(), (torch.randn(3),), FoldConstants())
    assert after is before


def test_tied_weights_are_not_folded_into_a_second_copy():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(200, 8)
            self.head = nn.Linear(8, 200, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return nn.functional.linear(self.embed(ids), self.head.weight * 0.5)

    before, after, report = simplified(Tied().eval(), (torch.arange(5),), FoldConstants())
    assert state_bytes(after) == state_bytes(before)
    assert any("frees 0" in m.reason for m in report.missed)


def test_half_precision_cones_keep_their_bits():
    weight = torch.randn(8, 8).bfloat16()

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x):
            return x @ (self.weight * 0.3 + 0.1)

    x = torch.randn(4, 8).bfloat16()
    _, after, _ = simplified(Scaled().eval(), (x,), FoldConstants())
    assert torch.equal(after.run([x])[0], x @ (weight * 0.3 + 0.1))
    assert torch.equal(after.state["weight_folded"], weight * 0.3 + 0.1)
