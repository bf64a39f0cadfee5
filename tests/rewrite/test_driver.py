"""Legality, fixpoint, overlap, several outputs and rollback of the rewrite driver."""

from __future__ import annotations

import pytest
import torch
from generated.harness import Only
from torch import nn

from graphopt.capture import capture
from graphopt.certify import certify
from graphopt.errors import IllegalRewriteError, VerificationError
from graphopt.pipeline import Context, run_pass
from graphopt.rewrite import Match, Numeric, Profit, Refusal, Rule, num, op
from graphopt.rewrite.driver import apply_rules

aten = torch.ops.aten


class Fn(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


def once(match: Match) -> Refusal | None:
    """A check for rules whose result looks like their own input."""
    made = match.root.meta.get("rewritten_by")
    return Refusal("already rewritten", match.root) if made else None


class Once(Rule):
    def check(self, match: Match) -> Refusal | None:
        return once(match)


class SinOfDouble(Rule):
    """sin(2x) = 2 sin(x) cos(x)."""

    pattern = op(aten.sin.default, op(aten.mul.Tensor, "x", num(2)))
    profit = Profit.ALWAYS

    def rewrite(self, match, build):
        sine, cosine = (build(t, match["x"]) for t in (aten.sin.default, aten.cos.default))
        return build(aten.mul.Tensor, build(aten.mul.Tensor, sine, cosine), 2)


def program_of(fn, *inputs, **options):
    return capture(Fn(fn).eval(), inputs or (torch.randn(3, 4),), **options)


def apply(program, *rules):
    work = program.copy()
    return work, apply_rules(work, rules)


def agree(program, work):
    with torch.no_grad():
        old, new = program.run(program.example_inputs), work.run(program.example_inputs)
    for a, b in zip(old, new, strict=True):
        torch.testing.assert_close(a, b)


def test_rewrite_replaces_and_removes_the_match():
    program = program_of(lambda x: (x * 2).sin() + 1)
    work, log = apply(program, SinOfDouble())
    assert len(log.rewrites) == 1
    assert {n.target for n in work.graph.nodes} & {aten.cos.default}
    agree(program, work)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: ((x * 2).sin(), x * 2 + 1), None),
        (lambda x: (lambda d: d.sin() + d)(x * 2), "also used by"),
        (lambda x: (lambda d: (d.sin(), d))(x * 2), "also an output of the model (user)"),
    ],
)
def test_intermediates_that_are_needed_elsewhere_block(fn, reason):
    program = program_of(fn)
    work, log = apply(program, SinOfDouble())
    if reason is None:
        assert len(log.rewrites) == 1
    else:
        assert not log.rewrites
        (missed,) = log.missed.values()
        assert reason in missed.reason
    agree(program, work)


def test_a_buffer_update_is_an_escape():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(3, 4))

        def forward(self, x):
            doubled = x * 2
            self.seen.copy_(doubled)
            return doubled.sin()

    program = capture(Counter().eval(), (torch.randn(3, 4),))
    work, log = apply(program, SinOfDouble())
    assert not log.rewrites
    assert any("buffer mutation" in m.reason for m in log.missed.values())
    agree(program, work)


def test_a_read_is_not_moved_across_an_in_place_write():
    """The written value is what the later read sees, directly and through a view."""

    def direct(x):
        y = x * 2
        before = y.sin()
        y.add_(1)
        return before + y.sin()

    def through_view(x):
        y = x * 2
        row = y[0]
        before = y.sin()
        row.zero_()
        return before + y.sin()

    for fn in (direct, through_view):
        x = torch.randn(3, 4)
        program = program_of(fn, x.clone())
        work, _ = apply(program, SinOfDouble())
        torch.testing.assert_close(work.run([x.clone()])[0], fn(x.clone()))


class SwapOutputs(Once):
    """A two-output rewrite whose second output needs a value defined late."""

    pattern = (op(aten.sin.default, "x"), op(aten.mul.Tensor, op(aten.cos.default, "x"), "y"))
    profit = Profit.ALWAYS
    numeric = Numeric.REASSOCIATED

    def rewrite(self, match, build):
        half = build(aten.mul.Tensor, match["x"], 1.0)
        product = build(aten.mul.Tensor, build(aten.cos.default, half), match["y"])
        return build(aten.sin.default, half), product


def test_two_outputs_whose_second_input_is_defined_late():
    def fn(x):
        early = x.sin()
        late = (x + 3).exp()
        return early, x.cos() * late

    program = program_of(fn)
    work, log = apply(program, SwapOutputs())
    assert len(log.rewrites) == 1
    work.lint()
    agree(program, work)


def test_an_input_that_depends_on_a_replaced_output_is_refused():
    program = program_of(lambda x: (lambda s: (s, x.cos() * s.exp()))(x.sin()))
    work, log = apply(program, SwapOutputs())
    assert not log.rewrites
    assert any("depends on a value that would be replaced" in m.reason for m in log.missed.values())
    agree(program, work)


class AddOne(Rule):
    """Never ends: every product becomes a longer product."""

    pattern = op(aten.mul.Tensor, "x", num("c"))
    profit = Profit.ALWAYS

    def rewrite(self, match, build):
        return build(aten.mul.Tensor, match["x"], match["c"])


def test_rules_that_never_settle_are_named():
    with pytest.raises(IllegalRewriteError, match="AddOne"):
        apply(program_of(lambda x: x * 3), AddOne())


class WrongShape(Rule):
    """Returns a reduced tensor."""

    pattern = op(aten.sin.default, "x")

    def rewrite(self, match, build):
        return build(aten.sum.dim_IntList, match["x"], [0])


class WrongDtype(Rule):
    """Returns float64."""

    pattern = op(aten.sin.default, "x")

    def rewrite(self, match, build):
        return build(aten._to_copy.default, match["x"], dtype=torch.float64)


class NoSuchCall(Rule):
    """Calls an operator with arguments it does not take."""

    pattern = op(aten.sin.default, "x")

    def rewrite(self, match, build):
        return build(aten.matmul.default, match["x"], match["x"])


class InPlace(Rule):
    """Emits a node that writes its input."""

    pattern = op(aten.sin.default, "x")

    def rewrite(self, match, build):
        return build(aten.sin_.default, match["x"])


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (WrongShape(), "shape"),
        (WrongDtype(), "dtype"),
        (NoSuchCall(), "does not fit"),
        (InPlace(), "writes its input"),
    ],
)
def test_illegal_replacements_are_refused_and_leave_no_trace(rule, reason):
    program = program_of(lambda x: x.sin() + 1)
    work, log = apply(program, rule)
    assert not log.rewrites
    assert any(reason in m.reason for m in log.missed.values())
    assert [str(n) for n in work.graph.nodes] == [str(n) for n in program.graph.nodes]


class FixesBatch(Once):
    """Works only for the size seen at capture."""

    pattern = op(aten.sin.default, "x")

    def rewrite(self, match, build):
        rows = build(aten.reshape.default, match["x"], [3, 4])
        return build(aten.sin.default, rows)


def test_a_rewrite_may_not_demand_a_size():
    dims = {"args": ({0: torch.export.Dim.DYNAMIC},)}
    program = program_of(lambda x: x.sin() + 1, torch.randn(3, 4), dynamic_shapes=dims)
    work, log = apply(program, FixesBatch())
    assert not log.rewrites
    for rows in (3, 5):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(work.run([x])[0], x.sin() + 1)


class Scaled(Once):
    """Deliberately wrong by a factor."""

    pattern = op(aten.sin.default, "x")
    profit = Profit.ALWAYS
    factor = 1.0

    def rewrite(self, match, build):
        return build(aten.mul.Tensor, build(aten.sin.default, match["x"]), self.factor)


def broken(numeric, factor, tolerance=0.0):
    attributes = {"numeric": numeric, "factor": factor, "tolerance": tolerance}
    return type("Broken", (Scaled,), {"__doc__": "Wrong.", **attributes})()


BROKEN = [
    broken(Numeric.BITWISE, 1 + 2e-7),
    broken(Numeric.REASSOCIATED, 1 + 2e-6),
    broken(Numeric.LOSSY, 1.06, tolerance=0.05),
]
SOUND = [
    broken(Numeric.BITWISE, 1.0),
    broken(Numeric.REASSOCIATED, 1 + 1e-7),
    broken(Numeric.LOSSY, 1.04, tolerance=0.05),
]


@pytest.mark.parametrize("rule", BROKEN, ids=lambda r: r.numeric.value)
def test_a_broken_rule_of_each_numeric_class_is_rolled_back(rule):
    program = program_of(lambda x: x.sin() + 1, torch.randn(64, 32))
    context = Context.of(program, measure=False)
    after = run_pass(program, Only(rule), context)
    assert context.report.applied == []
    (missed,) = [m for m in context.report.missed if m.stage == "verify"]
    assert "error" in missed.reason
    assert certify(program, after, context, name="whole")
    strict = Context.of(program, measure=False, strict=True)
    with pytest.raises(VerificationError, match="changes what the model computes"):
        run_pass(program, Only(rule), strict)


@pytest.mark.parametrize("rule", SOUND, ids=lambda r: r.numeric.value)
def test_a_sound_rule_of_each_numeric_class_is_kept(rule):
    program = program_of(lambda x: x.sin() + 1, torch.randn(64, 32))
    context = Context.of(program, measure=False)
    run_pass(program, Only(rule), context)
    assert len(context.report.applied) == 1


class WrongGradient(Once):
    """Right value, gradient off by one percent."""

    pattern = op(aten.sin.default, "x")
    profit = Profit.ALWAYS

    def rewrite(self, match, build):
        sine = build(aten.sin.default, match["x"])
        some = build(aten.mul.Tensor, sine, 0.99)
        frozen = build(aten.detach.default, build(aten.sub.Tensor, sine, some))
        return build(aten.add.Tensor, some, frozen)


def test_a_gradient_off_by_one_percent_is_rolled_back():
    program = program_of(lambda x: x.sin() + 1, torch.randn(64, 32))
    context = Context.of(program, measure=False)
    run_pass(program, Only(WrongGradient()), context)
    assert context.report.applied == []
    assert any("gradients" in m.reason for m in context.report.missed)


class OnlySome(Scaled):
    """Wrong for every second site."""

    numeric = Numeric.REASSOCIATED

    def rewrite(self, match, build):
        factor = 1.5 if match.root.name.endswith("1") else 1.0
        return build(aten.mul.Tensor, build(aten.sin.default, match["x"]), factor)


def test_only_the_wrong_rewrites_are_taken_back():
    program = program_of(lambda x: x.sin() + (x + 1).sin() + (x + 2).sin(), torch.randn(64, 32))
    context = Context.of(program, measure=False)
    run_pass(program, Only(OnlySome()), context)
    (summary,) = context.report.passes
    assert (summary.matched, summary.kept, summary.rolled_back) == (3, 2, 1)


class Slow(Scaled):
    """Right, but does the work many times over."""

    numeric = Numeric.REASSOCIATED
    profit = Profit.MEASURED

    def rewrite(self, match, build):
        value = match["x"]
        for _ in range(24):
            value = build(aten.mul.Tensor, value, 1.0)
        return build(aten.sin.default, value)


def test_a_rewrite_that_does_not_pay_is_not_kept():
    program = program_of(lambda x: x.sin() + 1, torch.randn(256, 256))
    context = Context.of(program)
    run_pass(program, Only(Slow()), context)
    (summary,) = context.report.passes
    assert (summary.matched, summary.kept, summary.slower) == (1, 0, 1)
    (missed,) = [m for m in context.report.missed if m.stage == "profit"]
    assert "slower here" in missed.reason


def test_a_pass_that_never_settles_is_left_out_and_explained():
    program = program_of(lambda x: x * 3)
    context = Context.of(program, measure=False)
    assert run_pass(program, Only(AddOne()), context) is program
    assert any("no fixpoint" in m.reason for m in context.report.missed)


class Rounded(Scaled):
    """Off by 4 %, which is allowed."""

    numeric, tolerance, factor = Numeric.LOSSY, 0.05, 1.04


@pytest.mark.parametrize(("more", "sound"), [(1.04, True), (1.12, False)])
def test_what_lossy_rewrites_add_up_to_is_held(more, sound):
    """Twice the root of three errors of 0.04 squared; integers may differ as seldom."""
    program = program_of(lambda x: (x.sin() + x.sin(), (x.sin() > 0.5).int()), torch.randn(64, 32))
    context = Context.of(program, measure=False)
    after = run_pass(program, Only(Rounded()), context)
    assert {a.certificate.numeric for a in context.report.applied} == {"lossy"}
    for node in after.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        node.args = (node.args[0], 1.04 * more)
    after.recompile()
    assert certify(program, after, context, name="whole") is sound
    bounds = [c.bound for c in context.report.whole if c.bound]
    assert bounds == pytest.approx([2 * 3**0.5 * 0.04] * len(bounds), rel=1e-5)
