"""Capture keeps what a module takes and returns, its state, and what it writes."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.program import Program
from graphopt.signature import InputKind, OutputKind

Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Batch:
    x: Tensor
    y: Tensor


@dataclasses.dataclass
class Scores:
    logits: Tensor
    count: int


class Calls(nn.Module):
    """A linear layer around a function of the test."""

    def __init__(self, function: Any, **buffers: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def x(rows: int = 3) -> Tensor:
    return torch.randn(rows, 4)


def returned(program: Program, *args: Any, **kwargs: Any) -> Any:
    """What a caller of the program gets, in the structure the model returned."""
    results = program.run(pytree.tree_leaves((args, kwargs)))
    users = [v for v, o in zip(results, program.outputs, strict=True) if o.kind is OutputKind.USER]
    assert program.call is not None
    return pytree.tree_unflatten(users, program.call.out_spec)


def same(a: Any, b: Any) -> bool:
    left, right = pytree.tree_flatten(a), pytree.tree_flatten(b)
    equal = (
        torch.equal(u, v) if isinstance(u, Tensor) else u == v
        for u, v in zip(left[0], right[0], strict=True)
    )
    return left[1] == right[1] and all(equal)


FORMS: dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {
    "positional and keyword": (Calls(lambda m, a, *, b: m.linear(a) + b), (x(),), {"b": x()}),
    "several positional": (Calls(lambda m, *a: sum(map(m.linear, a))), (x(), x(), x()), {}),
    "dict and list": (
        Calls(lambda m, d: {"out": m.linear(d["x"]), "rest": [d["y"][0] + 1]}),
        ({"x": x(), "y": (x(),)},),
        {},
    ),
    "namedtuple": (Calls(lambda m, p: Pair(m.linear(p.first), p.second)), (Pair(x(), x()),), {}),
    "dataclass": (Calls(lambda m, b: Scores(m.linear(b.x) + b.y, 2)), (Batch(x(), x()),), {}),
    "constants in": (
        Calls(lambda m, a, n, flag, mode, none: m.linear(a) * n if flag and mode == "go" else none),
        (x(), 3, True, "go", None),
        {},
    ),
    "constants out": (Calls(lambda m, a: (m.linear(a), None, 3, "text", True, 2.5)), (x(),), {}),
    "only constants out": (Calls(lambda m, a: (None, 1)), (x(),), {}),
    "an input returned": (Calls(lambda m, a: (a, m.linear(a))), (x(),), {}),
    "one value returned twice": (Calls(lambda m, a: [m.linear(a)] * 2), (x(),), {}),
    "a parameter returned": (Calls(lambda m, a: (m.linear.weight, a)), (x(),), {}),
    "views returned": (Calls(lambda m, a: (m.linear(a).T, a.view(-1), a[0])), (x(),), {}),
    "LSTM": (nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True), (torch.randn(2, 6, 4),), {}),
    "GRU": (nn.GRU(4, 5), (torch.randn(6, 2, 4),), {}),
    "RNN": (nn.RNN(4, 5, nonlinearity="relu"), (torch.randn(6, 2, 4),), {}),
    "complex": (Calls(lambda m, a: torch.view_as_real(torch.fft.fft(m.linear(a)))), (x(),), {}),
    "short-time fourier": (
        Calls(lambda m, a: torch.stft(a, 8, window=m.w, return_complex=True), w=torch.ones(8)),
        (torch.randn(2, 32),),
        {},
    ),
    "vmap": (Calls(lambda m, a: torch.vmap(lambda r: r.relu() * 2)(m.linear(a))), (x(),), {}),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_program_returns_what_the_model_returns(name: str) -> None:
    model, args, kwargs = FORMS[name]
    program = capture(model.eval(), args, kwargs)
    assert same(returned(program, *args, **kwargs), model(*args, **kwargs))


def test_masks_and_branches_of_control_flow_operators_are_kept() -> None:
    model = Calls(
        lambda m, a: torch.cond(a.sum() > 0, lambda v: m.linear(v), lambda v: v * 2, (a,))
    )
    program = capture(model.eval(), (torch.ones(3, 4),))
    for example in (torch.ones(3, 4), -torch.ones(3, 4)):
        assert same(returned(program, example), model(example))


def _counted(model: Any, a: Tensor) -> Tensor:
    model.count += 1
    model.table[0] = a.sum()
    return model.linear(a) + model.table


def _reassigned(model: Any, a: Tensor) -> Tensor:
    model.table = model.table * 0.5 + a.mean(0)
    return a * model.table


@pytest.mark.parametrize("function", [_counted, _reassigned])
def test_written_buffers_are_outputs(function: Any) -> None:
    model = Calls(function, table=torch.zeros(4), count=torch.tensor(0)).eval()
    program = capture(model, (x(),))
    example, eager = x(), copy.deepcopy(model)
    eager(example)
    results = dict(zip((o.target for o in program.outputs), program.run([example]), strict=True))
    written = program.mutated_state()
    assert written and all(torch.equal(results[n], dict(eager.named_buffers())[n]) for n in written)
    assert torch.equal(model.table, torch.zeros(4)), "the model's own buffer was written"


def test_a_written_buffer_without_persistence_is_still_a_buffer() -> None:
    model = Calls(lambda m, a: a * m.scale.add_(1)).eval()
    model.register_buffer("scale", torch.ones(4), persistent=False)
    program = capture(model, (x(),))
    (entry,) = (e for e in program.inputs.values() if e.target == "scale")
    assert program.mutated_state() == {"scale"} and not entry.persistent


def test_a_written_input_is_an_output() -> None:
    program = capture(Calls(lambda m, a: m.linear(a.add_(1))).eval(), (x(),))
    example = x()
    updated, result = program.run([example])
    assert program.outputs[0].kind is OutputKind.INPUT_MUTATION
    assert torch.equal(updated, example + 1) and result.shape == (3, 4)


def test_tied_parameters_stay_one_tensor_under_all_their_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            self.again = self.head

        def forward(self, ids: Tensor) -> Tensor:
            return self.again(self.embed(ids))

    model = Tied().eval()
    program = capture(model, (torch.tensor([[1, 2]]),))
    names = {"embed.weight", "head.weight", "again.weight"}
    assert names == program.state.keys()
    assert all(program.state[n] is model.embed.weight for n in names)
    assert len(program.state_nodes()) == 1


def test_a_compiled_module_is_copied_without_warnings() -> None:
    fast = graphopt.compile(nn.Linear(4, 4).eval(), example_inputs=(x(),), passes=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = copy.deepcopy(fast)
    example = x()
    assert same(twin(example), fast(example))
    with pytest.raises(GraphoptError, match="needs input"):
        twin()


def test_equal_tensors_that_are_not_tied_stay_apart() -> None:
    first = nn.Linear(4, 4, bias=False)
    second = nn.Linear(4, 4, bias=False)
    second.weight = nn.Parameter(first.weight.data)
    program = capture(nn.Sequential(first, second), (x(),))
    assert program.state["0.weight"] is first.weight
    assert program.state["1.weight"] is second.weight


def test_tensors_outside_parameters_and_buffers_are_constants() -> None:
    outside = torch.arange(4.0)

    def function(m: Any, a: Tensor) -> Tensor:
        return a * outside + m.plain + torch.tensor([1.0, 2.0, 3.0, 4.0])

    model = Calls(function).eval()
    model.plain = torch.ones(4)
    program = capture(model, (x(),))
    kinds = [e.kind for e in program.inputs.values() if e.target is not None]
    assert kinds and set(kinds) == {InputKind.CONSTANT}
    example = x()
    assert same(returned(program, example), model(example))


def test_the_program_keeps_the_mode_of_every_submodule() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).train()
    model[1].eval()
    example = torch.randn(2, 3, 8, 8)
    program = capture(model, (example,))
    eager = copy.deepcopy(model)
    assert program.training and not program.frozen
    assert same(returned(program, example), eager(example))
    assert {n.split(".")[0] for n in program.mutated_state()} == {"3"}


@pytest.mark.parametrize("training", [True, False])
def test_random_operators_draw_as_eager_does(training: bool) -> None:
    def function(m: Any, a: Tensor) -> Tensor:
        return F.dropout(m.linear(a), 0.5, training=m.training) + torch.rand(4)

    model = Calls(function).train(training)
    example = x()
    program = capture(model, (example,))
    torch.manual_seed(3)
    wanted = model(example)
    torch.manual_seed(3)
    assert same(returned(program, example), wanted)


def test_wrappers_are_taken_off_and_said() -> None:
    inner = nn.Linear(4, 4).eval()
    for wrapped in (nn.DataParallel(inner), torch.compile(inner, backend="eager")):
        program = capture(wrapped, (x(),))
        assert "weight" in program.state
        assert f"{type(wrapped).__name__} was unwrapped" in program.notes[0]


def test_hooks_run_during_the_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    model[0].register_forward_hook(lambda _m, _i, out: out * 2)
    model.register_forward_pre_hook(lambda _m, given: (given[0] + 1,))
    example = x()
    assert same(returned(capture(model, (example,)), example), model(example))


def test_autocast_regions_become_casts() -> None:
    def function(m: Any, a: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = torch.softmax(m.linear(a) @ a.T, -1)
            with torch.autocast("cpu", enabled=False):
                full = m.linear(a)
        return half.float().sum(-1, keepdim=True) + full

    model = Calls(function).eval()
    program = capture(model, (x(),))
    example = x()
    assert same(returned(program, example), model(example))
    assert not any(
        isinstance(n.target, torch._ops.HigherOrderOperator) for n in program.graph.nodes
    )
