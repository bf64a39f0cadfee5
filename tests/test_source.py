"""A node's line is the user's own: helpers included, libraries and plumbing left out."""

from __future__ import annotations

import inspect
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.capture import capture
from graphopt.source import (
    Frame,
    calling_line,
    innermost,
    is_user_file,
    module_path,
    source_line,
)

TORCH = str(Path(torch.__file__).parent)
STANDARD = sysconfig.get_paths()["stdlib"]
PACKAGES = "/opt/lib/python3.11/site-packages"


def helper(x: Tensor) -> Tensor:
    return x.sin()  # in the helper


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)  # in forward
        return helper(y)


def node_of(target: object, model: nn.Module) -> fx.Node:
    program = capture(model.eval(), (torch.rand(2, 4),))
    return next(n for n in program.graph.nodes if n.target is target)


def line_with(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return 1 + next(i for i, line in enumerate(lines) if line.endswith(text))


@pytest.mark.parametrize(
    "target, mark, path",
    [
        (torch.ops.aten.linear.default, "# in forward", "layers.0"),
        (torch.ops.aten.relu.default, "# in forward", "layers.1"),
        (torch.ops.aten.sin.default, "# in the helper", ""),
    ],
)
def test_lines_and_modules(target: object, mark: str, path: str) -> None:
    node = node_of(target, Model())
    assert source_line(node) == f"{__file__}:{line_with(mark)}"
    assert module_path(node) == path


def test_a_model_of_torch_alone_has_no_line() -> None:
    node = node_of(torch.ops.aten.relu.default, nn.Sequential(nn.ReLU()))
    assert source_line(node) is None and module_path(node) == "0"


def test_a_node_without_a_stack() -> None:
    node = fx.Graph().call_function(torch.sin, (1,))
    assert source_line(node) is None and module_path(node) == ""


@pytest.mark.parametrize(
    "file, own",
    [
        ("/home/me/model.py", True),
        (f"{PACKAGES}/timm/models/vit.py", True),
        (f"{PACKAGES}/transformers/models/bert/modeling_bert.py", True),
        (f"{TORCH}/nn/modules/linear.py", False),
        ("torch/fx/passes/runtime_assert.py", False),
        (f"{PACKAGES}/sympy/core/expr.py", False),
        (f"{PACKAGES}/numpy/core/numeric.py", False),
        (f"{STANDARD}/contextlib.py", False),
        (str(Path(graphopt.__file__).parent / "capture.py"), False),
        ("<string>", False),
    ],
)
def test_whose_file_it_is(file: str, own: bool) -> None:
    assert is_user_file(file) is own


def test_the_modeling_file_comes_before_its_plumbing() -> None:
    model = Frame(f"{PACKAGES}/transformers/models/bert/modeling_bert.py", 3)
    plumbing = Frame(f"{PACKAGES}/transformers/integrations/sdpa_attention.py", 9)
    user = Frame("/home/me/train.py", 1)
    inner = Frame(f"{TORCH}/nn/functional.py", 7)
    assert innermost([user, model, plumbing, inner]) == model
    assert innermost([plumbing, inner]) == plumbing
    assert innermost([inner]) is None


def test_the_line_being_executed() -> None:
    frame = inspect.currentframe()
    assert frame is not None
    assert calling_line() == f"{__file__}:{frame.f_lineno}"
