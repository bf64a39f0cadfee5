"""Sizes of 1 on dynamic axes: the module is the model there, or says why it refuses them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from generated.harness import Only
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.capture import capture
from graphopt.certify import certify
from graphopt.emit.module import OptimizedModule
from graphopt.errors import CaptureError, GraphoptError, VerificationError
from graphopt.pipeline import Context, run_pass
from graphopt.program import Program
from graphopt.rewrite import Numeric, Profit, Refusal, Rule, op
from graphopt.signature import Assumption
from graphopt.verify.inputs import accepts, sizes_of_one, symbols_of, unseen_sizes

aten = torch.ops.aten
BATCH = {"x": {0: Dim.DYNAMIC}}


class Fn(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def optimized(function: Any, rows: int = 3, shapes: Any = BATCH) -> tuple[nn.Module, nn.Module]:
    model = Fn(function).eval()
    example = torch.randn(rows, 4)
    return model, graphopt.compile(
        model, example_inputs=(example,), dynamic_shapes=shapes, measure=False
    )


RIGHT: dict[str, Any] = {
    "plain": lambda x: x.sin() + 1,
    "squeezed": lambda x: x.squeeze() + 1,
    "squeezed by axis": lambda x: x.squeeze(0) + 1,
    "expanded": lambda x: x.expand(x.shape[0], 4) * 2,
    "flattened": lambda x: x.reshape(x.shape[0], 2, 2).transpose(0, 1).flatten(1).cos(),
    "softmax over the batch": lambda x: x.softmax(0),
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", RIGHT)
def test_a_module_captured_with_any_batch_is_the_model_at_one(name: str, rows: int) -> None:
    model, fast = optimized(RIGHT[name], rows)
    for batch in (1, 2, 3, 6):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-6, atol=1e-6)


def fails_at_one(x: Tensor) -> Tensor:
    if x.shape[0] == 1:
        raise ValueError("a batch of one has no deviation")
    return x - x.mean(0)


class Norm(nn.Module):
    """In training mode a batch of one raises, the graph gives zeros or NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


REFUSED: dict[str, tuple[Any, str]] = {
    "branch": (lambda x: x * 3 if x.shape[0] == 1 else x * 2, "computes something else"),
    "structure": (lambda x: (x, x) if x.shape[0] > 1 else (x,), "computes something else"),
    "shape": (lambda x: x[0] if x.shape[0] == 1 else x, "computes something else"),
    "error": (fails_at_one, "raises ValueError: a batch of one has no deviation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_capture_that_is_wrong_at_one_refuses_it_with_the_reason(name: str) -> None:
    function, why = REFUSED[name]
    model, fast = optimized(function)
    x = torch.randn(2, 4)
    torch.testing.assert_close(fast(x), model(x))
    with pytest.raises(GraphoptError, match=f"axis 0 of x must be at least 2; at 1 .*{why}") as e:
        fast(torch.randn(1, 4))
    assert "leave their axes out of dynamic_shapes" in str(e.value.fix)
    assert any("must be at least 2" in note for note in fast.report.notes)


def test_a_batch_norm_in_training_refuses_one_as_the_model_does() -> None:
    program = capture(Norm(), (torch.randn(3, 4),), dynamic_shapes=BATCH)
    (assumption,) = program.assumptions
    assert "Expected more than 1 value per channel" in str(assumption.reason)


def test_an_example_of_one_where_the_graph_is_not_the_model_is_no_capture() -> None:
    with pytest.raises(CaptureError, match=r"a size of 1 that cannot be dynamic: axis 0 of x") as e:
        optimized(REFUSED["branch"][0], rows=1)
    assert "leave axes of size 1 out" in str(e.value.fix)
    model, fast = optimized(REFUSED["branch"][0], rows=1, shapes=None)
    x = torch.randn(1, 4)
    assert torch.equal(fast(x), model(x)) and torch.equal(fast(x), x * 3)


def test_two_axes_that_must_not_both_be_one() -> None:
    axes = {"x": {0: "batch", 1: "seq"}}
    model, fast = optimized(lambda x: x * 3 if x.numel() == 1 else x * 2, shapes=axes)
    for shape in ((1, 4), (4, 1), (5, 2)):
        x = torch.randn(shape)
        assert torch.equal(fast(x), model(x))
    with pytest.raises(GraphoptError, match=r"max\(batch, seq\) >= 2, but batch = 1, seq = 1"):
        fast(torch.randn(1, 1))


class Counting(nn.Module):
    """Writes a buffer otherwise where the batch is 1; its output is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(7 if x.shape[0] == 1 else 1)
        return x + 1


def test_buffers_count_as_answers_and_the_model_is_left_as_it_was() -> None:
    model = Counting().eval()
    program = capture(model, (torch.randn(3, 4),), dynamic_shapes=BATCH)
    assert [a.text for a in program.assumptions] == [f"{next(iter(symbols_of(program)))} >= 2"]
    assert float(model.seen) == 0 and model.calls == []


def test_a_capture_does_not_write_what_the_model_only_reads() -> None:
    model = Norm().eval()
    versions = {name: buffer._version for name, buffer in model.named_buffers()}
    capture(model, (torch.randn(3, 4),), dynamic_shapes=BATCH)
    assert versions == {name: buffer._version for name, buffer in model.named_buffers()}


class SameShapeAsTraced(Rule):
    """Deliberately wrong at 1: a squeeze that changed nothing in the trace."""

    pattern = op((aten.squeeze.default, aten.squeeze.dim), "x", ...)
    numeric = Numeric.BITWISE
    profit = Profit.ALWAYS

    def rewrite(self, match: Any, build: Any) -> Any:
        return build(aten.alias.default, match["x"])


class SpreadRow(Rule):
    """Deliberately wrong at 1: a product of two columns spreads only where there are several."""

    pattern = op(aten.sum.dim_IntList, "x", [0])
    numeric = Numeric.REASSOCIATED
    profit = Profit.ALWAYS

    def check(self, match: Any) -> Refusal | None:
        spread = match["x"].target is aten.slice.Tensor
        return Refusal("the rows are spread already", match["x"]) if spread else None

    def rewrite(self, match: Any, build: Any) -> Any:
        rest = build(aten.slice.Tensor, match["x"], 0, 1)
        first = build(aten.select.int, match["x"], 0, 0)
        second = build(aten.select.int, match["x"], 0, 1)
        others = build(aten.sum.dim_IntList, build(aten.slice.Tensor, rest, 0, 1), [0])
        return build(aten.add.Tensor, build(aten.add.Tensor, first, second), others)


WRONG_AT_ONE: dict[str, tuple[Rule, Any, str]] = {
    "shape": (SameShapeAsTraced(), lambda x: x.sin().squeeze() + 1, "became"),
    "error": (SpreadRow(), lambda x: x.sin().sum(0) + 1, "the new piece fails: "),
}


@pytest.mark.parametrize("name", WRONG_AT_ONE)
def test_a_rule_that_is_wrong_at_one_only_is_rolled_back(name: str) -> None:
    rule, function, why = WRONG_AT_ONE[name]
    program = capture(Fn(function), (torch.randn(3, 4),), dynamic_shapes=BATCH)
    context = Context.of(program, measure=False)
    after = run_pass(program, Only(rule), context)
    assert context.report.applied == []
    (missed,) = [m for m in context.report.missed if m.stage == "verify"]
    assert why in missed.reason
    assert certify(program, after, context, name="whole")
    with pytest.raises(VerificationError, match="changes what the model computes"):
        run_pass(program, Only(rule), Context.of(program, measure=False, strict=True))
    larger = Context.of(program, measure=False)
    larger.inputs = larger.inputs[:2]
    run_pass(program, Only(rule), larger)
    assert larger.report.applied, "the rule is right at every size but 1"


def test_the_whole_is_compared_at_one() -> None:
    program = capture(Fn(lambda x: x.squeeze() + 1), (torch.randn(3, 4),), dynamic_shapes=BATCH)
    wrong = capture(Fn(lambda x: x + 1), (torch.randn(3, 4),), dynamic_shapes=BATCH)
    context = Context.of(program, measure=False)
    assert not certify(program, wrong, context, name="whole")
    context.inputs = context.inputs[:2]
    assert certify(program, wrong, context, name="whole")


def program(rows: int, columns: int, *conditions: str, **shapes: Any) -> Program:
    axes = shapes or {"x": {0: "a", 1: "b"}}
    made = capture(Fn(torch.sin), (torch.randn(rows, columns),), dynamic_shapes=axes)
    symbols = {name: str(symbol) for symbol, name in made.axis_names.items()}
    made.assumptions = tuple(Assumption(c.format(**symbols)) for c in conditions)
    return made


def named(made: Program, sizes: Any) -> dict[str, int]:
    return {made.axis_names[symbol]: size for symbol, size in sizes.items()}


def test_each_axis_alone_and_all_at_once() -> None:
    made = program(8, 1)
    sets = [named(made, sizes) for sizes in sizes_of_one(made)]
    assert sets == [{"a": 1, "b": 3}, {"a": 3, "b": 1}, {"a": 1, "b": 1}]


def few_elements(x: Tensor) -> Tensor:
    return x * 3 if x.shape[0] * x.shape[1] < 3 else x * 2


def one_row(x: Tensor) -> Tensor:
    return x * 3 if x.shape[0] * x.shape[1] == 1 else x * 2


@pytest.mark.parametrize("function", [few_elements, one_row])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6)])
def test_products_of_sizes_are_tried_at_their_smallest(
    function: Any, shape: tuple[int, ...]
) -> None:
    axes = {"x": dict(enumerate("abc"[: len(shape)]))}
    model = Fn(function).eval()
    fast = graphopt.compile(
        model, example_inputs=(torch.randn(shape),), dynamic_shapes=axes, measure=False
    )
    refused = 0
    for sizes in itertools.product((1, 2, 3), repeat=len(shape)):
        x = torch.randn(sizes)
        try:
            torch.testing.assert_close(fast(x), model(x))
        except GraphoptError:
            refused += 1
    assert 0 < refused < 3 ** len(shape)


def test_only_sizes_that_a_call_may_have() -> None:
    made = program(8, 8, "{a} % 8 == 0", "{b} >= 2")
    assert sizes_of_one(made) == []
    assert named(made, unseen_sizes(made)) == {"a": 16, "b": 9}
    made = program(8, 8, "{a} != 3")
    assert {"a": 8, "b": 1} in [named(made, sizes) for sizes in sizes_of_one(made)]
    declared = program(4, 4, x={0: Dim("a", min=2), 1: Dim("b", min=2)})
    assert sizes_of_one(declared) == [] and unseen_sizes(declared)


def test_a_condition_that_cannot_be_computed_does_not_hold() -> None:
    made = program(4, 4, "{a} % ({b} // 2) == 0")
    a, b = made.axis_names
    assert accepts(made, {a: 4, b: 4}) and not accepts(made, {a: 4, b: 1})
    fast = OptimizedModule(made, graphopt.Report("sin"))
    with pytest.raises(GraphoptError, match="captured for sizes with"):
        fast(torch.randn(4, 1))
