"""AdaRound and FlexRound: the papers' formulas, and what is read is what is stored."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from test_quantized_learned import SCHEMES, weight
from torch import Tensor

from graphopt.kernels.quantized import QuantizedWeight, Scheme, gptq, quantize
from graphopt.kernels.quantized.adaround import AdaRound, annealed, charge, rectified
from graphopt.kernels.quantized.cells import all_levels, grouped
from graphopt.kernels.quantized.codes import encode
from graphopt.kernels.quantized.flexround import FlexRound
from graphopt.kernels.quantized.learnable import LearnableWeight
from graphopt.kernels.quantized.refine import levels

KINDS = (AdaRound, FlexRound)


def moment(width: int = 64) -> Tensor:
    """Of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(256, width, generator=generator) @ torch.randn(
        width, width, generator=generator
    )
    return x.T @ x / 256


def learned(learnable: LearnableWeight, steps: int, strength: float = 0.0) -> None:
    """Towards the negative of the weight, with a charge."""
    for step in range(steps):
        loss = (learnable.soft() + weight()).square().sum()
        charged = learnable.penalty(step / steps)
        (loss if charged is None else loss + strength * charged).backward()
        learnable.descend((1 - step / steps) / steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_read_is_what_is_stored(scheme: Scheme, kind: type[LearnableWeight]) -> None:
    start = quantize(weight(), scheme, "search")
    made = kind(weight(), start)
    assert torch.allclose(made.read(), start.dequantize(), rtol=1e-5, atol=1e-6)
    learned(made, 20)
    stored = made.stored()
    torch.testing.assert_close(made.read().detach(), stored.dequantize(), rtol=2e-6, atol=1e-6)
    assert (stored.unpacked().float() != start.unpacked().float()).float().mean() > 0.02
    assert stored.nbytes == start.nbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_of_another_method_are_where_it_starts(
    scheme: Scheme, kind: type[LearnableWeight]
) -> None:
    """Even where they are none of the two that a number lies between."""
    start = gptq(weight(), scheme, moment())
    plain = quantize(weight(), scheme, "search")
    assert (start.unpacked().float() != plain.unpacked().float()).float().mean() > 0.05
    made = kind(weight(), start)
    assert torch.equal(made.stored().unpacked().float(), start.unpacked().float())
    far = (weight().flip(0), start)  # any number beside any code
    assert torch.equal(kind(*far).stored().unpacked().float(), start.unpacked().float())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_number_lies_beside_its_code_on_its_own_side(scheme: Scheme) -> None:
    start = gptq(weight(), scheme, moment())
    found, plain = grouped(weight(), start), weight().view_as(grouped(weight(), start).scaled)
    scaled = plain / found.scales + (0 if found.zeros is None else found.zeros)
    moved = found.scaled != scaled
    assert moved.any()
    ends = all_levels(scheme)[[0, -1]]
    inner = moved & (found.levels != ends[0]) & (found.levels != ends[1])
    off, was = found.scaled - found.levels, scaled - found.levels
    assert (off.sign() == was.sign())[inner].all()
    assert (off.abs() < was.abs())[inner].all()


def test_a_tie_is_where_it_was_rounded_to() -> None:
    numbers = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.0, -4.0]])
    for dtype in ("int", "fp4"):
        scheme = Scheme(4, dtype)
        start = quantize(numbers * 2, scheme)
        for scale in (1.0, 0.25, 1 / 3):
            held = replace(start, scales=torch.full_like(start.scales, scale))
            made = AdaRound(numbers * scale, replace(held, codes=_rounded(numbers, scheme)))
            assert torch.equal(made.stored().codes, _rounded(numbers, scheme))


def _rounded(numbers: Tensor, scheme: Scheme) -> Tensor:
    codes = encode(numbers[None], torch.ones(1, 1, 1), None, scheme)[0]
    return QuantizedWeight.from_codes(codes, torch.ones(1, 1), None, scheme).codes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_adaround_starts_with_nothing_rounded(scheme: Scheme) -> None:
    """Numbers within their range are read as they are; others are at its end."""
    start = quantize(weight(), scheme, "search")
    made = AdaRound(weight(), start)
    found, values = grouped(weight(), start), all_levels(scheme)
    inside = (found.scaled >= values[0]) & (found.scaled <= values[-1])
    assert inside.float().mean() > 0.8
    soft = made.soft().view_as(inside)[inside]
    wide = weight().view_as(inside)[inside]
    off = (soft - wide).abs() / found.scales.expand_as(inside)[inside].abs()
    assert off.max() < 2e-3 * float(values[-1].clamp(min=1))  # of a tie, and of rounding


@pytest.mark.parametrize("scheme", [Scheme(4), Scheme(2, group_size=16, symmetric=False)], ids=str)
def test_adaround_rounds_up_or_down(scheme: Scheme) -> None:
    start = quantize(weight(), scheme, "search")
    made = AdaRound(weight(), start)
    learned(made, 30)
    codes, scaled = levels(made.stored().unpacked(), scheme), grouped(weight(), start).scaled
    low = scaled.flatten(1).floor()
    first, last = scheme.limits
    assert ((codes == low.clamp(first, last)) | (codes == (low + 1).clamp(first, last))).all()


def test_the_rectified_sigmoid_and_its_charge() -> None:
    v = torch.linspace(-4, 4, 41, dtype=torch.float64)
    h = (1.2 / (1 + torch.exp(-v)) - 0.1).clamp(0, 1)
    torch.testing.assert_close(rectified(v), h)
    torch.testing.assert_close(charge(h, 3.0), sum(1 - abs(2 * x - 1) ** 3 for x in h))
    assert (annealed(0.2), annealed(0.6), annealed(1.0)) == pytest.approx((20.0, 11.0, 2.0))
    made = AdaRound(weight(), quantize(weight(), Scheme(3)))
    assert made.penalty(0.1) is None
    assert made.penalty(0.5) is not None


@pytest.mark.parametrize("kind", ["int", "nf4"])
def test_a_charge_leaves_nothing_between_codes(kind: str) -> None:
    scheme = Scheme(4, kind, 16)
    made = AdaRound(weight(), quantize(weight(), scheme, "search"))
    learned(made, 100, strength=300.0)
    h = rectified(made.logits.detach())
    free = made.gaps != 0
    assert ((h == 0) | (h == 1))[free].float().mean() > 0.95
    off = (made.soft() - made.read()).norm() / made.read().norm()
    assert off < 0.02


def best_of_all(numbers: Tensor, moments: Tensor, start: QuantizedWeight) -> float:
    """The least error of any way to round a row ``(1, K)`` up and down."""
    found = grouped(numbers, start)
    low, errors = found.scaled.floor().flatten(), []
    for ups in itertools.product((0, 1), repeat=len(low)):
        codes = (low + torch.tensor(ups)).clamp(*start.scheme.limits)
        off = codes * found.scales.flatten() - numbers[0]
        errors.append(float(off @ moments @ off))
    return min(errors)


def test_adaround_comes_near_to_the_best_of_all_roundings() -> None:
    """Section 3.1: the quadratic problem that it relaxes."""
    ratios, nearest = [], []
    for seed in range(12):
        numbers = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
        start, moments = quantize(numbers, Scheme(3)), moment(8)
        made, steps = AdaRound(numbers, start), 100
        off = made.read() - numbers
        before = float((off @ moments * off).sum())
        for step in range(steps):
            off = made.soft() - numbers
            loss = (off @ moments * off).sum()
            charged = made.penalty(step / steps)
            (loss if charged is None else loss + 25 * before / 8 * charged).backward()
            made.descend((1 - step / steps) / steps)
        off = made.read() - numbers
        best = best_of_all(numbers, moments, start)
        ratios.append(min(float((off @ moments * off).sum()), before) / best)
        nearest.append(before / best)
    assert min(ratios) > 0.999
    assert sorted(ratios)[6] < 1.3
    assert sum(ratios) < 0.7 * sum(nearest), (ratios, nearest)


def by_hand(made: FlexRound) -> tuple[Tensor, Tensor, Tensor]:
    """``s1 * (clip(round(W / (s1 * S2 * s3) + z)) - z)``, straight through, its S2 and its s1."""
    divisors = made.divisors.detach().exp().requires_grad_()
    scales = (made.scales * made.stretch.detach().exp()).requires_grad_()
    zeros = 0.0 if made.zeros is None else made.zeros
    scaled = made.numbers / (scales * divisors * made.channels.detach().exp()) + zeros
    first, last = made.scheme.limits
    clipped = scaled.clamp(first - 0.5, last + 0.5)
    codes = clipped + (clipped.round().clamp(first, last) - clipped).detach()
    return ((codes - zeros) * scales).flatten(1), divisors, scales


@pytest.mark.parametrize("symmetric", [True, False])
def test_flexround_is_the_formula_of_the_paper(symmetric: bool) -> None:
    scheme = Scheme(3, symmetric=symmetric)
    made = FlexRound(weight(), quantize(weight(), scheme, "search"))
    with torch.no_grad():
        for moved in made.moves:
            moved.copy_(torch.randn(moved.shape, generator=torch.Generator().manual_seed(1)) / 4)
    pull = torch.randn(6, 64, generator=torch.Generator().manual_seed(5))
    (made.read() * pull).sum().backward()
    exact, divisors, scales = by_hand(made)
    torch.testing.assert_close(made.read(), exact, rtol=1e-5, atol=1e-6)
    (exact * pull).sum().backward()
    assert divisors.grad is not None
    assert scales.grad is not None
    torch.testing.assert_close(made.divisors.grad, divisors.grad * divisors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.stretch.grad, scales.grad * scales, rtol=1e-3, atol=1e-3)
    whole = (divisors.grad * divisors).sum((1, 2), keepdim=True)
    torch.testing.assert_close(made.channels.grad, whole, rtol=1e-3, atol=1e-4)


def test_large_numbers_move_their_divisors_more() -> None:
    """Proposition 3.1: with the gradient of the number."""
    made = FlexRound(weight(), quantize(weight(), Scheme(6)))
    made.read().sum().backward()
    assert made.divisors.grad is not None
    inner = made.divisors.grad != 0
    slope = (made.divisors.grad / -made.numbers)[inner]
    torch.testing.assert_close(slope, torch.ones_like(slope))


def test_codes_beyond_a_range_are_left_there() -> None:
    """A number that was clipped has no alternative."""
    scheme = Scheme(3)
    start = replace(quantize(weight(), scheme), scales=quantize(weight(), scheme).scales / 8)
    far = replace(start, codes=quantize(weight() * 8, scheme).codes)
    made = AdaRound(weight() * 100, far)
    learned(made, 20)
    assert torch.isfinite(made.soft()).all()
    torch.testing.assert_close(made.read(), made.stored().dequantize())
