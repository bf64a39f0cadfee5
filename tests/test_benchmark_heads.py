"""What the benchmarks of loss heads compare with is right, and their script runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import heads, loss_heads_gpu
from benchmarks.heads import Distilled, Head, Pairs, SigmoidPairs, peaked
from benchmarks.loss_heads_gpu import Setup, measured

KINDS = (Head, Distilled, Pairs, SigmoidPairs)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK", 5)  # several, the last one shorter
    monkeypatch.setattr(loss_heads_gpu, "ROUNDS", 1)
    monkeypatch.setattr(loss_heads_gpu, "WARM", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_in_float64_are_the_loss(kind: type[Head]) -> None:
    torch.manual_seed(0)
    head = kind(7, 12, torch.float64)
    hidden, targets, _ = peaked(head, 12)
    hidden.requires_grad_()
    factors = (hidden, head.weight)
    eager, chunked = head(hidden, targets), head.exact(*factors, targets)
    results = [[loss, *torch.autograd.grad(loss, factors)] for loss in (chunked, eager)]
    for found, expected in zip(*results, strict=True):  # eager rounds logits to float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, check_dtype=False)


def test_predictions_are_peaked() -> None:
    """As often right as they are sure, and far from evenly spread over the classes."""
    torch.manual_seed(0)
    head = Head(32, 1000, torch.float32)
    hidden, targets, entropy = peaked(head, 4000)
    loss = float(head(hidden, targets).detach())
    assert abs(loss - entropy) < 0.1
    assert entropy < 5


@pytest.mark.parametrize("kind", KINDS)
def test_every_peer_gives_figures_or_an_error(kind: type[Head]) -> None:
    found = measured(Setup(kind, 64, 16, 64, torch.float32), torch.device("cpu"))
    peers = {name: row for name, row in found.items() if isinstance(row, dict)}
    assert {"eager", "torch.compile", "graphopt"} <= peers.keys()
    for name, row in peers.items():
        assert_is_figures(row, named=name.startswith(("eager", "graphopt")))


def assert_is_figures(row: dict[str, Any], *, named: bool) -> None:
    if "error" in row:
        assert not named, row
        return
    errors = [row[k] for k in ("loss_error", "hidden_grad_error", "weight_grad_error")]
    assert max(errors) < 1e-4 and row["median_ms"] > 0
