"""What verification runs: as much as it needs, on the inputs that can tell something."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.passes import Canonicalize, QuantizeMatmul
from graphopt.rewrite.driver import apply_rules
from graphopt.verify.measure import equal_bits
from graphopt.verify.replay import Replay


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 64)

    def forward(self, x):
        y = self.first(x) * 1.0  # what a rule removes
        return self.head(self.second(y).relu())


def test_nothing_is_run_behind_the_last_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    program = graphopt.compile(Deep().eval(), example_inputs=(torch.randn(4, 16),), passes=[])
    before = program.program
    work = before.copy()
    log = apply_rules(work, list(Canonicalize().rules()))
    assert log.rewrites
    ran: list[str] = []
    run = torch.fx.Interpreter.run_node

    def seen(self: torch.fx.Interpreter, node: torch.fx.Node) -> object:
        if isinstance(self, Replay):
            ran.append(str(node.target))
        return run(self, node)

    monkeypatch.setattr(torch.fx.Interpreter, "run_node", seen)
    verdicts = Replay(before, log).judge([torch.randn(4, 16)])
    assert len(verdicts) == len(log.rewrites)
    assert all(v.ok for v in verdicts)
    assert sum("linear" in target for target in ran) == 1, ran


def test_exact_rewrites_see_one_calibration_input_and_lossy_ones_see_all() -> None:
    texts = [torch.randn(4, 16) for _ in range(3)]
    fast = graphopt.compile(
        Deep().eval(),
        example_inputs=(torch.randn(4, 16),),
        calibration=texts,
        passes=["Canonicalize", QuantizeMatmul(activations=None)],
        measure=False,
    )
    report = fast.report
    lossy = {c.runs for c in report.losses}
    exact = {a.certificate.runs for a in report.applied if a.certificate not in report.losses}
    assert exact
    assert lossy == {runs + len(texts) - 1 for runs in exact}


NAN = float("nan")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([0.0, 1.0], [-0.0, 1.0], False),
        ([NAN, 1.0], [NAN, 1.0], True),
        ([NAN, 1.0], [NAN, 2.0], False),
        ([NAN, 0.0], [NAN, -0.0], False),
        ([1.0, 2.0], [1.0, NAN], False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits(one: list[float], other: list[float], same: bool, dtype: torch.dtype) -> None:
    assert equal_bits(torch.tensor(one, dtype=dtype), torch.tensor(other, dtype=dtype)) is same


def test_kinds_of_nan_are_one() -> None:
    other = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert equal_bits(torch.tensor([NAN]), other)
