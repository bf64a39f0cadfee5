"""Weights moved before they are rounded, so that they make good what layers before them lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_quantize_calibrated import batches, error, quantized
from test_quantize_importance import batches as importance_batches
from test_quantize_importance import model as importance_model
from test_quantize_importance import prepared
from torch import Tensor

from graphopt.passes.quantize import blocks, plan
from graphopt.passes.quantize.methods import methods
from graphopt.passes.quantize.observed import Observed
from graphopt.passes.quantize.plan import products_of
from graphopt.passes.quantize.propagation import Propagation, Sums, _halves


def rows(seed: int, count: int = 256, width: int = 24) -> Tensor:
    """Rows whose features depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, width, generator=generator) @ basis


def pairs(count: int, lost: Tensor) -> list[tuple[Tensor, Tensor, None]]:
    """Inputs in the float model, and what a linear map leaves of them."""
    return [(x, x @ lost, None) for x in (rows(seed) for seed in range(count))]


def test_a_loss_that_is_a_linear_map_is_made_good() -> None:
    """Where ``x = M x0``, what serves is ``W M^-1``: there is nothing else to learn."""
    lost = torch.eye(24) + 0.1 * torch.randn(24, 24, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(7, 24, generator=torch.Generator().manual_seed(2))
    halves = _halves(pairs(6, lost), 6)
    assert halves is not None
    moved = weight + weight @ halves.whole.map
    new, gone = rows(77), rows(77) @ lost
    before = (gone @ weight.t() - new @ weight.t()).norm()
    after = (gone @ moved.t() - new @ weight.t()).norm()
    assert after < 0.25 * before
    assert halves.share(weight) > 0.95


def test_noise_is_not_learned() -> None:
    """Few inputs, and noise: what one half taught is wrong on the other."""
    noisy = [(x + torch.randn_like(x) * 0.3, x, None) for x in (rows(s, 16) for s in range(2))]
    halves = _halves(noisy, 2)
    assert halves is not None
    assert halves.share(torch.randn(7, 24)) < 0.2


def test_one_sample_is_judged_by_its_halves() -> None:
    x = rows(0)
    found = _halves([(x, x, None)], 1)
    assert found is not None
    assert torch.allclose(found.first.moment, x[:128].t() @ x[:128], rtol=1e-5)
    assert torch.allclose(found.whole.moment, x.t() @ x, rtol=1e-4, atol=1e-3)
    assert not found.first.drift.any()


def test_other_rows_are_no_pairs() -> None:
    """Routers may send other tokens to an expert than in the float model."""
    assert _halves([(rows(0, 8), rows(0, 9), None)], 1) is None
    assert _halves([(rows(0, 8), rows(0, s), None) for s in (8, 7)], 2) is None


@pytest.mark.parametrize("count", [1, 3])
def test_rows_count_as_their_importance_says(count: int) -> None:
    """As if each were there r times: what no row counts might as well not be there."""
    x0, x = (torch.stack([rows(s + k, 8) for s in range(4)]) for k in (0, 50))
    counts = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)).square()
    found = _halves([(x0, x, counts)] * count, count)
    assert found is not None
    moment = torch.einsum("bs,bsi,bsj->ij", counts, x, x) * count
    drift = torch.einsum("bs,bsi,bsj->ij", counts, x0 - x, x) * count
    torch.testing.assert_close(found.whole.moment, moment, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.whole.drift, drift, rtol=1e-4, atol=1e-3)
    if count == 1:
        half = torch.einsum("bs,bsi,bsj->ij", counts[:2], x[:2], x[:2])
        torch.testing.assert_close(found.first.moment, half, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("importance", ["norm", "attention"])
def test_importance_is_that_of_the_second_moment(importance: Any) -> None:
    data = importance_batches((24, 24))
    program, stage = prepared(importance_model(), data)
    samples = [[x] for x in data]
    products = [n for m in stage.matches(program) for n in products_of(m)]
    observed = Observed(program, samples, products, importance=importance)
    beside = Propagation.of(program, samples, products)
    while observed.left:
        product = observed.next()
        beside.look(product, observed)
        halves = beside.halves[product.args[0]]
        assert halves is not None
        seen = observed.statistics[product.args[0]].moment
        torch.testing.assert_close(halves.whole.moment, seen, rtol=1e-4, atol=1e-3)
        plain = sum(
            x.flatten(0, -2).T @ x.flatten(0, -2) for x in observed.stream.given(product.args[0])
        )
        assert (halves.whole.moment - plain).norm() > 0.1 * plain.norm()
        assert not halves.whole.drift.any()  # nothing is quantized yet


@pytest.mark.parametrize("method", ["propagate", "propagate+learned"])
def test_calibration_counts_rows_in_both(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = importance_batches((24, 24)), []

    class Watched(Propagation):
        def look(self, product: Any, quantized: Observed) -> None:
            super().look(product, quantized)
            halves = self.halves[product.args[0]]
            assert halves is not None
            moment = quantized.statistics[product.args[0]].moment
            torch.testing.assert_close(halves.whole.moment, moment, rtol=1e-4, atol=1e-3)
            seen.append(float(halves.whole.drift.norm()))

    for module in (plan, blocks):
        monkeypatch.setattr(module, "Propagation", Watched)
    steps = 2 if "learned" in method else None
    options: dict[str, Any] = {"method": method, "importance": "attention", "steps": steps}
    program, stage = prepared(importance_model(), data, **options)
    made: Any = stage.calibrated(program, [[x] for x in data], lambda _text: None)
    assert len(made.plan.weights) == len(seen) == 10
    assert seen[0] == 0 and all(drift > 0 for drift in seen[3:])
    assert not any("count the same" in note for note in made.plan.notes.values())


def test_the_map_is_the_solution_of_least_squares() -> None:
    drift = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    moment = torch.diag(torch.arange(1.0, 6.0))
    want = drift / (torch.arange(1.0, 6.0) + 0.03)
    assert torch.allclose(Sums(drift, moment).map, want, rtol=1e-5)


@pytest.mark.parametrize("method", ["gptq+propagate", "propagate", "gptq+propagate+learned"])
def test_it_is_nearer_than_gptq_alone(method: str) -> None:
    options = {"bits": 2, "group_size": 32, "symmetric": False, "tolerance": 2.0}
    calibration = batches(12)
    alone = quantized(method="gptq", calibration=calibration, **options)
    moved = quantized(method=method, calibration=calibration, **options)
    assert error(moved) < 0.98 * error(alone)
    told = "before it was learned" if "learned" in method else "makes good"
    notes = moved.report.quantization.notes
    assert any("makes good" in note and told in note for note in notes)


def test_it_goes_with_gptq() -> None:
    assert methods("propagate").rounding == "gptq"
    assert methods("awq+propagate").calibrated == ("awq", "gptq", "propagate")
    with pytest.raises(ValueError, match="leave hqq out"):
        methods("hqq+propagate")


def test_sums_are_kept_for_products_to_come_alone() -> None:
    from torch import fx

    graph = fx.Graph()
    given = [graph.placeholder(name) for name in "ab"]
    weight = graph.placeholder("w")
    made = [graph.call_function(torch.ops.aten.linear.default, (x, weight)) for x in given]
    beside = Propagation.__new__(Propagation)
    beside.halves = dict.fromkeys(given)
    beside.keep(made[1:])
    assert list(beside.halves) == given[1:]
