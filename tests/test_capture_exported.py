"""Exported programs, in both dialects and through a file, become programs."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.experimental import _export_forward_backward

from graphopt.capture import capture, from_exported
from graphopt.emit.exported import to_exported
from graphopt.emit.guards import CallBinder, InputGuard
from graphopt.errors import CaptureError, GraphoptError

aten = torch.ops.aten


class Model(nn.Module):
    """Tied weights, a written buffer, a loose buffer, a constant, and a branch on a size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def forward(self, ids: Tensor, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y = self.embed(ids)
        with torch.no_grad():
            self.mean.mul_(0.5).add_(y.mean((0, 1)))
        if ids.shape[0] % 2 == 0:
            y = y * 2
        return self.head(y * self.scale + self.mean), extra["m"].sum() + torch.tensor(2.0)


def arguments(batch: int = 4, seq: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randint(0, 7, (batch, seq)), {"m": torch.rand(batch, seq)}


def exported(model: nn.Module) -> ExportedProgram:
    both = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return torch.export.export(model, arguments(), dynamic_shapes=(both, {"m": both}), strict=False)


def through_a_file(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("from_file", [False, True])
def test_both_dialects_run_as_the_model(decomposed: bool, from_file: bool) -> None:
    model = Model()
    source = exported(model)
    source = source.run_decompositions({}) if decomposed else source
    source = through_a_file(source) if from_file else source
    program = from_exported(source, training=False, frozen=True)
    program.lint()
    example = arguments(6, 5)
    found = program.run(CallBinder(program)(example, {}))
    wanted = model(*example)
    assert torch.equal(found[0], model.mean)
    assert all(torch.equal(a, b) for a, b in zip(found[1:], wanted, strict=True))
    assert program.mutated_state() == {"mean"}


def test_ties_survive_a_file() -> None:
    program = from_exported(through_a_file(exported(Model())), training=False, frozen=True)
    assert program.state["embed.weight"] is program.state["head.weight"]


def test_conditions_on_sizes_survive_a_file() -> None:
    program = from_exported(through_a_file(exported(Model())), training=False, frozen=True)
    guard, bind = InputGuard(program), CallBinder(program)
    guard(bind(arguments(2, 9), {}))
    with pytest.raises(GraphoptError, match="% 2"):
        guard(bind(arguments(3, 9), {}))


def test_stopped_gradients_stay_stopped() -> None:
    model = Model()
    program = from_exported(exported(model), training=True, frozen=False)
    example = arguments()
    weight = program.state["head.weight"]
    results = program.run(CallBinder(program)(example, {}))
    (found,) = torch.autograd.grad(results[1].sum(), weight)
    (wanted,) = torch.autograd.grad(model(*example)[0].sum(), model.head.weight)
    assert torch.allclose(found, wanted)


def test_a_program_goes_out_and_comes_back() -> None:
    axes = {0: "batch", 1: "seq"}
    model = Model()
    program = capture(model, arguments(), dynamic_shapes=(axes, {"m": axes}))
    back = from_exported(through_a_file(to_exported(program)), training=False, frozen=True)
    assert [str(n.target) for n in back.graph.nodes if n.op == "call_function"] == [
        str(n.target) for n in program.graph.nodes if n.op == "call_function"
    ]
    example = CallBinder(back)(arguments(2, 8), {})
    InputGuard(back)(example)
    assert all(
        torch.equal(a, b) for a, b in zip(back.run(example), program.run(example), strict=True)
    )


def test_what_trains_has_no_operator_that_cannot() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.zeros(3, 4)
            table[:, 1:] = x
            return table.transpose(0, 1).reshape(2, 6).view(12)

    example = torch.rand(3, 3)
    trained = capture(Writes().train(), (example,))
    kept = {n.target for n in trained.graph.nodes}
    assert not kept & {aten.copy.default, aten.view.default, aten._unsafe_view.default}
    assert torch.equal(trained.run([example])[0], Writes()(example))


def test_an_exported_backward_is_refused() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).sum()

    source = torch.export.export(Loss(), (torch.rand(2, 2),), strict=False)
    joint = _export_forward_backward(source)
    with pytest.raises(CaptureError, match="returns a"):
        from_exported(joint, training=True, frozen=False)
