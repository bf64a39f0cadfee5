"""Codes with a remainder: exact splits, what is chosen, and products that come nearer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.kernels.quantized import QuantizedWeight, Scheme, gptq, quantize
from graphopt.kernels.quantized import outliers as choosing
from graphopt.kernels.quantized.gptq import damped
from graphopt.kernels.quantized.lowrank import low_rank
from graphopt.kernels.quantized.remainder import Columns, LowRank, Numbers
from graphopt.kernels.quantized.split import Beside, Round, Seen, Split, split

OUTPUTS, WIDTH = 48, 64
KINDS = ("columns", "numbers")


def problem(rows: int = 600) -> tuple[Tensor, Seen]:
    """A weight, and inputs that are correlated, some of them large."""
    torch.manual_seed(0)
    x = torch.randn(rows, WIDTH) @ (torch.randn(WIDTH, WIDTH) * torch.rand(WIDTH) * 2) / 8
    x[:, 5] *= 6
    return torch.randn(OUTPUTS, WIDTH) / 8, Seen(x.t() @ x, x[x.abs().amax(1).argmax()])


def rounding(scheme: Scheme, method: str = "rtn") -> Round:
    def made(weight: Tensor, moment: Tensor | None) -> QuantizedWeight:
        if method == "gptq" and moment is not None:
            return gptq(weight, scheme, moment)
        return quantize(weight, scheme, "search", None if moment is None else moment.diagonal())

    return made


def loss(weight: Tensor, seen: Seen, made: Split) -> float:
    off = made.dense() - weight
    return float(((off @ seen.moment * off).sum() / (weight @ seen.moment * weight).sum()).sqrt())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_it_kept_is_exact_however_few_bits(kind: str, symmetric: bool) -> None:
    weight, seen = problem()
    scheme = Scheme(2, group_size=32, symmetric=symmetric)
    for known in (None, seen):
        found = split(weight, rounding(scheme), Beside(10**6, kind), known)
        torch.testing.assert_close(found.dense(), weight, rtol=2e-3, atol=2e-4)
    full = split(weight, rounding(scheme), Beside(rank=OUTPUTS), seen)
    torch.testing.assert_close(full.dense(), weight, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(
    "wanted",
    [Beside(0.03), Beside(0.015, "numbers"), Beside(rank=3), Beside(0.03, "columns", 2)],
    ids=str,
)
def test_each_kind_makes_products_nearer(wanted: Beside, method: str) -> None:
    weight, seen = problem()
    codes = rounding(Scheme(3, group_size=32), method)
    plain, found = split(weight, codes, Beside(), seen), split(weight, codes, wanted, seen)
    assert loss(weight, seen, found) < 0.97 * loss(weight, seen, plain)
    assert found.nbytes == found.weight.nbytes + sum(part.nbytes for part in found.parts)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_makes_good_what_rounding_loses(kind: str) -> None:
    """No value could be better: the slope of the squared error is zero where something is kept."""
    weight, seen = problem()
    found = split(weight, rounding(Scheme(3)), Beside(6, kind), seen)
    slope = ((found.dense() - weight) @ damped(seen.moment, 0.01)).abs()
    here = found.parts[0].dense(WIDTH) != 0
    assert here.sum() == (6 if kind == "numbers" else 6 * OUTPUTS)
    assert slope[here].mean() < 0.01 * slope[~here].mean()


def test_codes_that_are_never_multiplied_are_not_made_good() -> None:
    weight, _ = problem()
    codes = rounding(Scheme(2, symmetric=False))
    (part,) = split(weight, codes, Beside(5), apart=True).parts
    exact = weight[:, part.tensors["places"]].half()
    assert torch.equal(part.tensors["values"], exact)
    (part,) = split(weight, codes, Beside(5)).parts
    assert not torch.equal(part.tensors["values"], exact)


def test_columns_that_suffer_most() -> None:
    """As many as asked for, in rising order; a large input and a badly rounded one among them."""
    weight, seen = problem()
    weight[:, 40] *= 8
    found = split(weight, rounding(Scheme(3)), Beside(3), seen)
    (part,) = found.parts
    assert isinstance(part, Columns)
    assert part.places.tolist() == sorted(part.places.tolist())
    assert len(part.places) == 3
    assert {5, 40} <= set(part.places.tolist())


def test_rounding_leaves_kept_columns_out() -> None:
    """Symmetric codes of kept columns are zero, and the rest is rounded under what is left."""
    weight, seen = problem()
    moments: list[Tensor] = []

    def watched(given: Tensor, moment: Tensor | None) -> QuantizedWeight:
        assert moment is not None
        moments.append(moment)
        return quantize(given, Scheme(4))

    found = split(weight, watched, Beside(2), seen)
    places = found.parts[0].tensors["places"]
    assert not found.weight.unpacked()[:, places].any()
    first, last = moments[0].double(), moments[-1].double()
    rest = [k for k in range(WIDTH) if k not in places.tolist()]
    inverse = torch.linalg.inv(first)[rest][:, rest]  # Schur complements are inverses of these
    torch.testing.assert_close(last[rest][:, rest], inverse.inverse(), rtol=1e-4, atol=1e-6)
    assert not last[places].any()


def test_low_rank_is_the_best_of_its_rank() -> None:
    """Against the decomposition of the whole, for products and not for numbers."""
    weight, seen = problem()
    error = weight - quantize(weight, Scheme(3)).dequantize()
    factor = torch.linalg.cholesky(seen.moment)
    made = low_rank(error, 5, factor)
    least = torch.linalg.svdvals((error @ factor).double())[5:].square().sum()
    off = (error - made.dense(WIDTH)).double() @ factor.double()
    assert float(off.square().sum() / least) == pytest.approx(1, abs=1e-3)
    plain = (error - low_rank(error, 5).dense(WIDTH)) @ factor
    assert plain.square().sum() > 1.05 * off.square().sum()


def test_low_rank_of_a_large_matrix_is_as_near() -> None:
    torch.manual_seed(0)
    error = torch.randn(300, 400) / (1 + torch.arange(400) / 4)
    made, again = low_rank(error, 4), low_rank(error, 4)
    least = torch.linalg.svdvals(error)[4:].square().sum()
    assert (error - made.dense(400)).square().sum() < 1.01 * least
    assert torch.equal(made.left, again.left)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_compute_what_they_stand_for(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    dense, x = torch.randn(OUTPUTS, WIDTH), torch.randn(2, 3, WIDTH, dtype=kind)
    mask = torch.rand(OUTPUTS, WIDTH) < 0.05
    mask[7] = False
    places = torch.tensor([3, 9, 60])
    parts = {
        "numbers": (Numbers.of(dense, mask), dense * mask),
        "columns": (Columns(places, dense[:, places]), None),
        "rank": (LowRank(dense[:, :2], dense[:2]), dense[:, :2] @ dense[:2]),
    }
    for part, wanted in parts.values():
        whole = part.dense(WIDTH) if wanted is None else wanted
        torch.testing.assert_close(part.dense(WIDTH), whole)
        made = part.product(x)
        assert (made.shape, made.dtype) == ((2, 3, OUTPUTS), kind)
        true = x.double() @ whole.double().t()
        assert (made - true).norm() < 4 * torch.finfo(kind).eps * true.norm()
    only = parts["columns"][0].dense(WIDTH)
    assert torch.equal(only[:, places], dense[:, places])
    assert int(only.any(0).sum()) == 3


def test_super_weights() -> None:
    """Found one after the other, and nothing where neither side spikes."""
    weight, _ = problem()
    row = torch.randn(WIDTH)
    assert choosing.super_weights(weight, row) == []
    row[11] = 300.0
    weight[:, 11] /= 100
    assert choosing.super_weights(weight, row) == []
    weight[20, 11], weight[3, 11] = 4.0, -2.0
    assert choosing.super_weights(weight, row) == [(20, 11), (3, 11)]
    spread = torch.full((WIDTH,), 30.0)  # no input is alone in this
    weight[20] = 1.0
    assert choosing.super_weights(weight, spread) == []


@pytest.mark.parametrize("kind", KINDS)
def test_super_weights_alone(kind: str) -> None:
    weight, seen = problem()
    row = torch.randn(WIDTH)
    row[11], weight[20, 11] = 400.0, 3.0
    found = split(weight, rounding(Scheme(3)), Beside(0, kind), Seen(seen.moment, row))
    assert found.super_weights == 1
    assert len(found.parts[0].tensors["places"]) == 1
    assert float(found.dense()[20, 11]) == pytest.approx(3.0, abs=0.1)
    assert split(weight, rounding(Scheme(3)), Beside(0, kind)).parts == []


def test_numbers_in_uneven_rows() -> None:
    """Systems of all sizes at once, and of none, are those solved one by one."""
    weight, seen = problem()
    error, moment = weight, damped(seen.moment, 0.01)
    mask = torch.zeros(OUTPUTS, WIDTH, dtype=torch.bool)
    mask[0], mask[2, :7], mask[5, 3] = True, True, True
    made = choosing.best_numbers(error, mask, moment)
    assert not made[~mask].any()
    for row in (0, 2, 5):
        at = mask[row]
        wanted = torch.linalg.solve(moment[at][:, at], (error[row] @ moment)[at])
        torch.testing.assert_close(made[row, at], wanted, rtol=1e-3, atol=1e-3)


def test_half_precision_holds_what_fits() -> None:
    weight, seen = problem()
    for scale, kind in ((1.0, torch.float16), (1e7, torch.float32)):
        found = split(weight * scale, rounding(Scheme(4)), Beside(2), seen)
        assert found.parts[0].tensors["values"].dtype == kind
    low = split(weight.bfloat16(), rounding(Scheme(4)), Beside(2, rank=1), seen)
    assert {t.dtype for p in low.parts for t in p.tensors.values()} == {torch.bfloat16, torch.int64}


def test_wide_inputs_have_longer_places() -> None:
    mask = torch.zeros(1, 40_000, dtype=torch.bool)
    mask[0, 39_999] = True
    made = Numbers.of(torch.ones(1, 40_000), mask)
    assert (made.places.dtype, made.places.item()) == (torch.int32, 39_999)
    assert Numbers.of(torch.ones(1, 9), mask[:, -9:]).places.dtype == torch.int16
