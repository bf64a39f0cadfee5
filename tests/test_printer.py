"""Programs print as Python that a person can read, and that Python can parse."""

from __future__ import annotations

import ast

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.printer import describe, to_python
from graphopt.program import Program


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> tuple[Tensor, None, int]:
        self.steps += 1
        first, second = self.linear(x).split([1, 2], -1)
        return torch.cat([first, second], -1).mean(), None, 3


@pytest.fixture
def program() -> Program:
    return capture(Model().eval(), (torch.rand(2, 4),), dynamic_shapes={"x": {0: "n"}})


def test_a_program_prints_as_python(program: Program) -> None:
    text = str(program)
    assert text == to_python(program)
    assert text.startswith("def Model(\n") and text.endswith("\n")
    ast.parse("\n".join(line.split("  # ")[0].replace(" <- ", " = ") for line in _valid(text)))


def _valid(text: str) -> list[str]:
    """Lines with annotations that are shapes taken out, and updates spelled as assignments."""
    lines = []
    for line in text.splitlines():
        head, _, _ = line.partition(": ")
        is_parameter = line.startswith("    ") and line.split("  # ")[0].endswith("],")
        lines.append(f"{head}," if is_parameter else line.replace("'steps'", "steps"))
    return lines


def test_it_shows_shapes_state_lines_and_updates(program: Program) -> None:
    text = str(program)
    symbol = next(iter(program.axis_names))
    assert "p_linear_weight: f32[3, 4],  # parameter linear.weight" in text
    assert f"x: f32[{symbol}, 4]," in text
    assert f"= aten.linear(x, p_linear_weight, p_linear_bias)  # f32[{symbol}, 3]" in text
    assert f"    # {__file__}:" in text
    assert "    'steps' <- add" in text and "# buffer_mutation" in text
    assert text.splitlines()[-1].startswith("    return (mean, None, 3)")


def test_it_shows_which_rule_made_a_node(program: Program) -> None:
    node = next(n for n in program.graph.nodes if n.op == "call_function")
    node.meta["rewritten_by"] = ["FirstRule", "SecondRule"]
    assert "<- FirstRule, SecondRule" in str(program)


@pytest.mark.parametrize(
    "value, text",
    [
        (torch.zeros(2, 3), "f32[2, 3]"),
        (torch.zeros((), dtype=torch.bool), "bool[]"),
        (torch.zeros(1, dtype=torch.complex64), "complex64[1]"),
        ([torch.zeros(1, dtype=torch.int8), None], "(i8[1], NoneType)"),
        (3, "int"),
    ],
)
def test_values_are_described(value: object, text: str) -> None:
    assert describe(value) == text
