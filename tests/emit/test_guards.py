"""Every call is checked against what the capture assumed, quickly and in the user's words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from counting import counted
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.emit.guards import InputGuard, compiled
from graphopt.errors import GraphoptError
from graphopt.program import Program
from graphopt.signature import Assumption

AXES = {0: "batch", 1: "seq"}


class Model(nn.Module):
    def forward(
        self, ids: Tensor, options: dict[str, Tensor], scale: float = 2.0, mode: str | None = None
    ) -> Tensor:
        table = torch.ones(16)[: ids.shape[1]]
        return (ids * options["mask"] + table) * scale + options["bias"]


@pytest.fixture(scope="module")
def program() -> Program:
    args = inputs(2, 5)
    options = {"mask": AXES, "bias": None}
    return capture(Model(), args, dynamic_shapes={"ids": AXES, "options": options})


def inputs(batch: int, seq: int) -> tuple[Any, ...]:
    options = {"mask": torch.rand(batch, seq), "bias": torch.rand(1)}
    return torch.ones(batch, seq, dtype=torch.int64), options, 2.0, None


def flat(batch: int = 2, seq: int = 5, **changes: Any) -> list[Any]:
    ids, options, scale, mode = inputs(batch, seq)
    values = {"ids": ids, **options, "scale": scale, "mode": mode, **changes}
    return list(values.values())


@pytest.mark.parametrize("batch, seq", [(2, 5), (1, 1), (7, 16)])
def test_sizes_within_the_ranges_pass(program: Program, batch: int, seq: int) -> None:
    InputGuard(program)(flat(batch, seq))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too long": ({"seq": 17}, r"ids has shape \(2, 17\): axis 1 `seq` must be between 1 and 16"),
    "empty": ({"batch": 0}, r"ids has shape \(0, 5\): axis 0 `batch` must be at least 1"),
    "unequal": ({"mask": torch.rand(2, 6)}, r"mask'\] has shape .* `seq` must be 5, as in ids"),
    "static axis": ({"bias": torch.rand(2)}, r"options\['bias'\] has .* axis 0 must be 1"),
    "rank": ({"bias": torch.rand(())}, r"has shape \(\), expected 1 axes"),
    "dtype": ({"ids": torch.ones(2, 5)}, "ids is torch.float32 on cpu, expected torch.int64"),
    "device": ({"bias": torch.rand(1, device="meta")}, "on meta, expected torch.float32 on cpu"),
    "not a tensor": ({"ids": [[1]]}, "ids must be a tensor, not list"),
    "another constant": ({"scale": 3.0}, "scale is 3.0, but .* captured with 2.0"),
    "another type": ({"scale": 2}, "scale is 2, but"),
    "not none": ({"mode": "fast"}, "mode is 'fast', but .* captured with None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_program_was_not_captured_for_is_refused(program: Program, name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(GraphoptError, match=message) as caught:
        InputGuard(program)(flat(**changes))
    assert caught.value.where == "call of Model"


def test_the_number_of_inputs(program: Program) -> None:
    with pytest.raises(GraphoptError, match="takes 5 inputs, but 2 were given"):
        InputGuard(program)(flat()[:2])


def test_nan_is_equal_to_the_captured_nan() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float) -> Tensor:
            return x * scale

    guard = InputGuard(capture(Scaled(), (torch.rand(2), math.nan)))
    guard([torch.rand(2), math.nan])
    with pytest.raises(GraphoptError, match=r"scale is 1\.0"):
        guard([torch.rand(2), 1.0])


def test_a_guard_costs_a_few_calls_for_each_input(program: Program) -> None:
    guard, given = InputGuard(program), flat()
    _, calls = counted(lambda: guard(given))
    assert calls < 20 * len(given)


HOSTILE = ["__import__('os')", "s0.__class__", "(lambda: 1)()", "[s0]", "math.pow", "open", "s1"]


@pytest.mark.parametrize("text", HOSTILE)
def test_conditions_are_arithmetic_only(text: str) -> None:
    with pytest.raises(GraphoptError, match="not a condition on sizes"):
        compiled(text, ["s0"])


def test_conditions_of_a_file_are_not_run(program: Program) -> None:
    twin = program.copy()
    twin.assumptions = (Assumption("__import__('os')"),)
    with pytest.raises(GraphoptError, match="not a condition on sizes"):
        InputGuard(twin)


def test_conditions_compute() -> None:
    condition = compiled("(a % 2 == 0) and max(a, b) < 9 and math.floor(a / 2) != b", ["a", "b"])
    assert condition(a=4, b=3) and not condition(a=4, b=2) and not condition(a=3, b=1)
