"""A program answers for its graph, its state and its legality."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.errors import IllegalRewriteError
from graphopt.program import Program
from graphopt.signature import InputKind, OutputKind

aten = torch.ops.aten


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.tensor(0.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.steps += 1
        y = self.second(self.first(x))
        return y, x


@pytest.fixture
def program() -> Program:
    return capture(Model().eval(), (torch.rand(2, 4),))


def test_inputs_and_outputs(program: Program) -> None:
    kinds = [program.inputs[n.name].kind for n in program.placeholders()]
    assert kinds[-1] is InputKind.USER and set(kinds[:-1]) == {
        InputKind.PARAMETER,
        InputKind.BUFFER,
    }
    assert [n.name for n in program.user_inputs()] == ["x"]
    assert [o.kind for o in program.outputs] == [
        OutputKind.BUFFER_MUTATION,
        OutputKind.USER,
        OutputKind.USER,
    ]
    assert program.user_outputs()[1] is program.user_inputs()[0]


def test_what_is_constant_depends_on_the_kind_and_on_frozen(program: Program) -> None:
    states = {target: node for node, target in program.state_nodes().items()}
    (user,) = program.user_inputs()
    assert program.is_constant(states["first.bias"])
    assert not program.is_constant(states["steps"]) and not program.is_constant(user)
    program.frozen = False
    assert not program.is_constant(states["first.bias"])
    assert program.tensor(states["first.bias"]) is program.state["first.bias"]
    with pytest.raises(IllegalRewriteError, match="x is not state"):
        program.tensor(user)


def test_aliases_map_tied_names_to_one(program: Program) -> None:
    aliases = program.aliases()
    assert aliases["second.weight"] == aliases["first.weight"]
    assert aliases["second.bias"] == "second.bias"


def test_a_copy_is_independent_but_shares_tensors(program: Program) -> None:
    twin = program.copy()
    twin.notes.append("only here")
    twin.add_state("extra", torch.ones(1), torch.ones(1))
    assert "extra" not in program.state and "only here" not in program.notes
    assert len(twin.placeholders()) == len(program.placeholders()) + 1
    assert twin.state["first.bias"] is program.state["first.bias"]
    twin.lint()
    program.lint()


def test_added_state_gets_a_free_name_and_goes_when_unread(program: Program) -> None:
    names = set(program.state)
    node = program.add_state("first.bias", torch.ones(4), torch.ones(4))
    assert program.inputs[node.name].target == "first.bias_1"
    assert program.drop_unused_state() == ["first.bias_1"]
    assert set(program.state) == names


def test_running_on_other_state(program: Program) -> None:
    wide = {name: t.detach().double() for name, t in program.state.items()}
    example = torch.rand(2, 4)
    narrow, exact = program.run([example]), program.run([example.double()], wide)
    assert exact[1].dtype is torch.float64 and torch.allclose(narrow[1], exact[1].float())


def test_lint_refuses_a_write(program: Program) -> None:
    node = next(n for n in program.graph.nodes if n.target is aten.linear.default)
    with program.graph.inserting_after(node):
        program.graph.call_function(aten.relu_.default, (node,))
    with pytest.raises(IllegalRewriteError, match=r"relu_.* writes its input"):
        program.lint()


def test_lint_refuses_a_signature_that_disagrees(program: Program) -> None:
    twin = program.copy()
    del twin.inputs["x"]
    with pytest.raises(IllegalRewriteError, match="placeholders and signature"):
        twin.lint()
    program.outputs.pop()
    with pytest.raises(IllegalRewriteError, match="output node and signature"):
        program.lint()


def test_the_flow_of_a_program_is_a_graph(program: Program) -> None:
    flow = program.flow()
    assert flow.is_directed() and flow.number_of_nodes() == len(list(program.graph.nodes))
