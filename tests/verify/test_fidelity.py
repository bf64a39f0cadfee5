"""Signal, noise and divergence against numpy and torch's own losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.verify import fidelity
from graphopt.verify.fidelity import Divergence, Energy, divergence, energy


def pair(shape: tuple[int, ...], noise: float = 0.1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    exact = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
    off = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (exact + noise * off).float(), exact


def test_against_numpy() -> None:
    value, exact = pair((7, 33))
    found = energy(value, exact)
    assert found is not None
    v, r = value.double().numpy().ravel(), exact.numpy().ravel()
    ratio = np.mean(r**2) / np.mean((v - r) ** 2)
    assert found.sqnr == pytest.approx(10 * np.log10(ratio), rel=1e-12)
    assert found.error == pytest.approx(np.linalg.norm(v - r) / np.linalg.norm(r), rel=1e-12)
    cosine = F.cosine_similarity(value.double().ravel(), exact.ravel(), dim=0, eps=0)
    assert found.cosine == pytest.approx(float(cosine), rel=1e-12)
    assert found.sqnr == pytest.approx(-20 * math.log10(found.error), rel=1e-12)


def test_sums_are_those_of_values_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    value, exact = pair((9, 20))
    whole = energy(value, exact)
    first, second = energy(value[:4], exact[:4]), energy(value[4:], exact[4:])
    assert whole and first and second
    joined = first + second
    assert joined.sqnr == pytest.approx(whole.sqnr, rel=1e-12)
    assert (joined.count, whole.count) == (180, 180)
    monkeypatch.setattr(fidelity, "CHUNK", 7)
    parts = energy(value, exact)
    assert parts and parts.cosine == pytest.approx(whole.cosine, rel=1e-12)


def test_exact_values_have_no_ratio() -> None:
    x = torch.randn(5)
    found = energy(x, x.double())
    assert found
    assert (found.error, found.sqnr) == (0.0, None)
    assert found.cosine == pytest.approx(1.0)


def test_zeros() -> None:
    zeros, x = torch.zeros(4), torch.full((4,), 0.5)
    silent, noisy, lost = energy(zeros, zeros), energy(x, zeros), energy(zeros, x)
    assert silent and noisy and lost
    assert (silent.error, silent.sqnr, silent.cosine) == (0.0, None, None)
    assert (noisy.error, noisy.sqnr, noisy.cosine) == (1.0, None, None)
    assert (lost.error, lost.sqnr, lost.cosine) == (1.0, 0.0, None)


def test_places_that_are_not_finite_are_left_out() -> None:
    value, exact = pair((50,))
    holes = value.clone()
    holes[3], holes[10] = math.nan, -math.inf
    keep = torch.ones(50, dtype=torch.bool)
    keep[[3, 10]] = False
    found, wanted = energy(holes, exact), energy(value[keep], exact[keep])
    assert found and wanted
    assert found.count == 48
    assert found.sqnr == pytest.approx(wanted.sqnr, rel=1e-12)


@pytest.mark.parametrize("value", [torch.ones(3, dtype=torch.int64), 1.0, None])
def test_what_is_not_floating_has_none(value: object) -> None:
    assert energy(value, value) is None


def test_nothing_counts_nothing() -> None:
    found = energy(torch.ones(0, 3), torch.ones(0, 3))
    assert found == Energy()


@pytest.mark.parametrize("chunk", [2**22, 8])
def test_divergence_is_that_of_torch(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "CHUNK", chunk)
    value, exact = pair((3, 4, 11), noise=0.5)
    found = divergence(value, exact)
    logs = value.double().log_softmax(-1), exact.log_softmax(-1)
    wanted = F.kl_div(*logs, log_target=True, reduction="none").sum(-1)
    assert found.rows == 12
    assert found.mean == pytest.approx(float(wanted.mean()), rel=1e-9)
    shifted = divergence(value + 3.0, exact - 5.0)
    assert shifted.mean == pytest.approx(found.mean, rel=1e-5)


def test_divergence_of_masked_classes() -> None:
    """What both rule out costs nothing; what the quantized alone rules out, without bound."""
    exact = torch.tensor([[1.0, 2.0, -math.inf]])
    assert divergence(exact, exact.double()).mean == 0.0
    assert divergence(torch.tensor([[1.0, -math.inf, 0.0]]), exact.double()).mean == math.inf


def test_rows_that_are_nan_are_left_out() -> None:
    value, exact = pair((4, 6))
    value[2, 1] = math.nan
    found = divergence(value, exact)
    assert found.rows == 3 and found.mean is not None and math.isfinite(found.mean)
    assert Divergence().mean is None
