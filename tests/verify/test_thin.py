"""Large values are verified on few rows: the same program, the same rewrites, little memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import graphopt
from graphopt import room
from graphopt.capture import capture
from graphopt.passes import FuseLossHead
from graphopt.passes.loss_head.fuse import row_axes
from graphopt.passes.loss_head.heads import BATCH, CLASSES, HEADS, TOKENS, WIDTH, Head
from graphopt.program import Program
from graphopt.rewrite import Axis, Builder, Match, Pass, Rule, op, var
from graphopt.verify import thin
from graphopt.verify.thin import thinned

aten = torch.ops.aten
SHORT = 6
"""Tokens per batch on which heads are verified here."""

OTHER_VALUES = frozenset(
    {
        "token weights", "padded", "last rows", "last token", "distilled", "contrastive",
        "sigmoid pairs", "queue", "found", "positions", "groups weighted", "groups distilled",
        "margin in place",
    }
)  # fmt: skip
"""Heads that read sizes or rows of their inputs in front of the product, which stay as they were:
on fewer rows they are other functions than the model, though of the same operators."""


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "ROWS", BATCH * SHORT)
    monkeypatch.setattr(thin, "FEWEST", 4)
    monkeypatch.setattr(thin, "LARGE", 0)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, TOKENS, WIDTH), torch.randint(0, CLASSES, (BATCH, TOKENS))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        real = (
            t.numel()
            for t in pytree.tree_leaves(made)
            if isinstance(t, Tensor) and type(t) is Tensor
        )
        self.numel = max(self.numel, *real, 0)
        return made


@pytest.mark.parametrize("name", [name for name in HEADS if name not in OTHER_VALUES])
def test_a_thin_program_is_the_model_on_fewer_rows(name: str) -> None:
    model, (h, t) = Head(HEADS[name]).train(), inputs()
    program = capture(model, (h, t))
    small = thinned(program, [FuseLossHead(min_bytes=0)], [])
    assert small is not None
    found = [v for v in small.program.run([h, t]) if v is not None]
    wanted = pytree.tree_leaves(model(h[:, :SHORT], t[:, :SHORT]))
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("name", HEADS)
def test_rewrites_are_verified_on_few_rows(name: str) -> None:
    model, args = Head(HEADS[name]).train(), inputs()
    fast = graphopt.compile(model, example_inputs=args, passes=["Canonicalize", FuseLossHead()])
    assert "FuseRowSummaries" in [a.rule for a in fast.report.applied], fast.report.missed
    (note,) = [n for n in fast.report.notes if "is verified with" in n]
    assert f"with {BATCH * SHORT} of" in note
    for certificate in fast.report.certificates:
        assert certificate.error <= certificate.bound
    whole = [c for c in fast.report.whole if c.rule == "whole program"]
    assert whole and all(c.gradient_error is not None for c in whole)


def test_sizes_that_are_dynamic_are_made_small_by_the_inputs() -> None:
    model, (h, t) = Head(HEADS["mean"]).train(), inputs()
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    program = capture(model, (h, t), dynamic_shapes=({0: batch, 1: tokens},) * 2)
    small = thinned(program, [FuseLossHead(min_bytes=0)], [])
    assert small is not None
    assert [tuple(x.shape[:2]) for x in small.program.example_inputs] == [(BATCH, SHORT)] * 2
    assert all(x.is_contiguous() for x in small.program.example_inputs)


def test_nothing_of_the_size_of_the_logits_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda _device: BATCH * TOKENS * CLASSES * 4)
    model, args = Head(HEADS["mean"]).train(), inputs()
    with Largest() as largest:
        fast = graphopt.compile(model, example_inputs=args, passes=["Canonicalize", FuseLossHead()])
    assert largest.numel < BATCH * TOKENS * CLASSES
    (note,) = [n for n in fast.report.notes if "was not compared" in n]
    assert "`linear` alone takes" in note
    torch.testing.assert_close(fast(*args), model(*args))


def test_numbers_of_any_notation_are_those_of_sizes() -> None:
    """Of 20,000 rows each counts for 5e-05 of a mean, of fewer for 0.04 perhaps."""
    model = Head(lambda m, h, t: m.logits(h).logsumexp(-1).mean() + 0 * t.sum()).train()
    args = torch.randn(4, 5000, WIDTH), torch.zeros(4, 5000, dtype=torch.int64)
    report = graphopt.compile(model, example_inputs=args, passes="exact", measure=False).report
    assert "FuseRowSummaries" in [a.rule for a in report.applied], report.missed
    assert any(f"verified with {4 * SHORT} of 20000 rows" in note for note in report.notes)


def test_where_memory_is_there_the_capture_is_compared() -> None:
    fast = graphopt.compile(Head(HEADS["mean"]).train(), example_inputs=inputs())
    assert next(c.rule for c in fast.report.whole) == "capture"


class Wrong(Rule):
    """``cross_entropy(x) = factor * cross_entropy(x)``, which is wrong unless the factor is 1."""

    pattern = op(aten.cross_entropy_loss.default, var("x"), var("t"), None, 1)

    def __init__(self, factor: float, only_many: bool = False) -> None:
        self.factor, self.only_many = factor, only_many

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        x, t = match["x"], match["t"]
        many = x.meta["val"].shape[0] > BATCH * SHORT
        made = build(aten.cross_entropy_loss.default, x, t, None, 2)
        factor = self.factor if many or not self.only_many else 1.0
        if self.only_many and not many:
            made = build(aten.neg.default, build(aten.neg.default, made))
        return build(aten.mul.Tensor, made, factor / x.meta["val"].shape[0])


@dataclass(frozen=True)
class Scale(Pass):
    factor: float = 1.0
    only_many: bool = False

    def axes(self, program: Program) -> list[list[Axis]]:
        return row_axes(program, 0)

    def rules(self) -> list[Rule]:
        return [Wrong(self.factor, self.only_many)]


@pytest.mark.parametrize(
    ("step", "why"),
    [(Scale(1.01), "error above the bound"), (Scale(1.01, only_many=True), "fewer rows")],
    ids=["wrong", "wrong for many rows"],
)
def test_a_wrong_rewrite_is_found_on_few_rows(step: Pass, why: str) -> None:
    model, args = Head(HEADS["mean"]).train(), inputs()
    fast = graphopt.compile(model, example_inputs=args, passes=[step], measure=False)
    assert not fast.report.applied
    assert why in fast.report.missed[0].reason
    torch.testing.assert_close(fast(*args), model(*args))


class ByPosition(nn.Module):
    """Reads every third row of a few."""

    def forward(self, h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        logits = F.linear(h, w)
        return F.cross_entropy(logits[0], t[0]) + logits.logsumexp(-1)[:, 50:60:3].sum()


def test_what_cannot_be_made_thin_is_verified_whole() -> None:
    h, t = inputs()
    args = (h, torch.randn(CLASSES, WIDTH), t)
    program = capture(ByPosition().train(), args)
    told: list[str] = []
    assert thinned(program, [FuseLossHead(min_bytes=0)], told) is None
    assert told[0].startswith("large values are verified whole: ")
    fast = graphopt.compile(ByPosition().train(), example_inputs=args)
    torch.testing.assert_close(fast(*args), ByPosition()(*args))


def test_inductor_is_compared_with_the_rewritten_graph_where_the_original_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda _device: BATCH * TOKENS * CLASSES * 4)
    model, args = Head(HEADS["mean"]).train(), inputs()
    passes = ["Canonicalize", FuseLossHead(chunk_bytes=CLASSES * 64)]
    fast = graphopt.compile(model, example_inputs=args, passes=passes, target="inductor")
    assert not [n for n in fast.report.notes if "torch target was kept" in n]
    torch.testing.assert_close(fast(*args), model(*args))
