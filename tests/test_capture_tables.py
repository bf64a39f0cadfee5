"""Tables that are looked up by position limit the sizes a program takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.capture import capture
from graphopt.emit.guards import InputGuard
from graphopt.errors import CaptureError, GraphoptError

ROWS = 16
Positions = Callable[[Tensor], Tensor]


class Positioned(nn.Module):
    """``x`` of shape ``(B, S, 4)`` plus the rows of a table at positions that depend on ``S``."""

    def __init__(self, positions: Positions) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, 4)
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(self.positions(x))


def x(size: int) -> Tensor:
    return torch.ones(2, size, 4)


def most(model: nn.Module, dynamic: Any = None) -> float:
    """The largest size that a captured program takes."""
    axes = {0: "batch", 1: "seq"} if dynamic is None else dynamic
    program = capture(model.eval(), (x(4),), dynamic_shapes=(axes,))
    return {symbol: high for symbol, _, high in InputGuard(program).ranges}[
        next(str(s) for s, name in program.axis_names.items() if name == "seq")
    ]


POSITIONS: dict[str, tuple[Positions, float | None]] = {
    "from zero": (lambda x: torch.arange(x.shape[1]), 16),
    "as GPT-2": (lambda x: (torch.arange(x.shape[1]) + 0).unsqueeze(0), 16),
    "behind padding": (lambda x: torch.arange(x.shape[1]) + 2, 14),
    "from a start": (lambda x: torch.arange(2, x.shape[1] + 2), 14),
    "before": (lambda x: torch.arange(3, x.shape[1] + 3) - 3, 16),
    "for every row": (lambda x: torch.arange(x.shape[1])[None].expand(x.shape[0], -1), 16),
    "int32": (lambda x: torch.arange(x.shape[1], dtype=torch.int32).long(), 16),
    "twice as many": (lambda x: torch.arange(2 * x.shape[1])[None].view(-1, 2).unbind(1)[0], None),
    "clamped": (lambda x: torch.arange(x.shape[1]).clamp(max=ROWS - 1), None),
    "every second": (lambda x: torch.arange(0, 2 * x.shape[1], 2), None),
    "cut off": (lambda x: torch.arange(x.shape[1] + 8)[: x.shape[1]], None),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_a_limit_is_found_only_where_it_is_certain(name: str) -> None:
    positions, limit = POSITIONS[name]
    found = most(Positioned(positions))
    assert found == (float("inf") if limit is None else limit)


@pytest.mark.parametrize(
    "select",
    [
        lambda m, i: m.table.weight[i],
        lambda m, i: m.table.weight.index_select(0, i),
        lambda m, i: m.table.weight.T[:, i].T,
    ],
)
def test_other_selections_by_position(select: Callable[..., Tensor]) -> None:
    class Selecting(Positioned):
        def forward(self, x: Tensor) -> Tensor:
            return x + select(self, self.positions(x))

    assert most(Selecting(lambda x: torch.arange(x.shape[1]))) == ROWS


def test_the_longest_size_runs_and_the_next_is_refused_by_name() -> None:
    model = Positioned(lambda x: torch.arange(x.shape[1])).eval()
    fast = graphopt.compile(model, example_inputs=(x(4),), dynamic_shapes=({1: "seq"},), passes=[])
    assert torch.equal(fast(x(ROWS)), model(x(ROWS)))
    with pytest.raises(GraphoptError, match=r"axis 1 `seq` must be between 1 and 16"):
        fast(x(ROWS + 1))
    assert any("must be at most 16" in note for note in fast.report.notes)


def test_a_declared_range_is_narrowed_or_refused() -> None:
    model = Positioned(lambda x: torch.arange(x.shape[1]))
    assert most(model, {1: Dim("seq", min=2, max=9)}) == 9
    assert most(model, {1: Dim("seq", min=2, max=99)}) == ROWS
    with pytest.raises(CaptureError, match=r"`seq` must be at least 20, but .* ends at 16"):
        capture(model.eval(), (x(21),), dynamic_shapes=({1: Dim("seq", min=20, max=99)},))
