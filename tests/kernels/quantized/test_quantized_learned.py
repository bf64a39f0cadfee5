"""Weights that are learned: gradients as stated, and what is read is what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.kernels.quantized import Scheme, quantize
from graphopt.kernels.quantized.learned_scales import LearnedScales, can_learn
from graphopt.kernels.quantized.signround import LearnedRounding

SCHEMES = [
    Scheme(4),
    Scheme(3, group_size=16),
    Scheme(2, group_size=16, symmetric=False),
    Scheme(8, symmetric=False),
    Scheme(4, "nf4", 16),
    Scheme(4, "fp4"),
    Scheme(8, "fp8"),
    Scheme(4, "mxfp4"),
    Scheme(4, "nvfp4"),
]
FINE = [s for s in SCHEMES if can_learn(s)]


def weight(rows: int = 6, width: int = 64) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3))


def moved(learnable: LearnedRounding | LearnedScales, steps: int = 20) -> None:
    """Towards the negative of the weight: everything moves."""
    for _ in range(steps):
        (learnable.read() + weight()).square().sum().backward()
        learnable.descend(1 / steps)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_read_is_what_is_stored(scheme: Scheme) -> None:
    start = quantize(weight(), scheme, "search")
    learned = LearnedRounding(weight(), start)
    assert torch.allclose(learned.read(), start.dequantize(), rtol=1e-5, atol=1e-6)
    moved(learned)
    stored = learned.stored()
    torch.testing.assert_close(learned.read().detach(), stored.dequantize(), rtol=2e-6, atol=1e-6)
    assert (stored.unpacked().float() != start.unpacked().float()).float().mean() > 0.1
    assert stored.nbytes == start.nbytes
    assert learned.shifts.abs().max() <= 0.5


@pytest.mark.parametrize("scheme", FINE, ids=str)
def test_learned_scales_keep_codes(scheme: Scheme) -> None:
    start = quantize(weight(), scheme, "search")
    learned = LearnedScales(start)
    assert torch.equal(learned.read(), start.dequantize())
    moved(learned)
    stored = learned.stored()
    torch.testing.assert_close(learned.read().detach(), stored.dequantize(), rtol=2e-6, atol=1e-6)
    assert torch.equal(stored.unpacked().float(), start.unpacked().float())
    assert stored.nbytes == start.nbytes
    assert not torch.equal(stored.scales, start.scales)


def test_scales_of_a_coarse_format_are_not_learned() -> None:
    assert [s.dtype for s in SCHEMES if not can_learn(s)] == ["mxfp4", "nvfp4"]


def by_hand(learned: LearnedRounding, shifts: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Rounding and clipping of a shifted number, straight through where it is not clipped."""
    first, last = learned.scheme.limits
    shifted = learned.numbers / scales + zeros + shifts
    clipped = shifted.clamp(first - 0.5, last + 0.5)
    codes = clipped + (clipped.round().clamp(first, last) - clipped).detach()
    return (codes - zeros) * scales


@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_of_integers(bits: int) -> None:
    scheme = Scheme(bits, group_size=16, symmetric=False)
    start = quantize(weight(), scheme, "search")
    learned, other = (LearnedRounding(weight() * 1.5, start) for _ in range(2))
    pull = torch.randn(6, 64, generator=torch.Generator().manual_seed(5))
    (learned.read() * pull).sum().backward()
    assert other.zeros is not None
    scales, zeros = (t.clone().requires_grad_() for t in (other.scales, other.zeros))
    made = by_hand(other, other.shifts, scales, zeros)
    (made.flatten(1) * pull).sum().backward()
    torch.testing.assert_close(learned.shifts.grad, other.shifts.grad)
    assert (learned.shifts.grad == 0).any()  # clipped
    # ends of a range of width w move by w: s by s, and the zero point with its low end
    assert scales.grad is not None
    assert zeros.grad is not None
    first, last = scheme.limits
    by_low = scales.grad * other.scales
    by_low += zeros.grad * ((last - first) - (other.zeros - first))
    torch.testing.assert_close(learned.ends[0].grad, by_low, rtol=1e-3, atol=1e-4)
    by_high = scales.grad * other.scales - zeros.grad * (other.zeros - first)
    torch.testing.assert_close(learned.ends[1].grad, by_high, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", [Scheme(3, group_size=16), Scheme(4, "nf4", 16)], ids=str)
def test_shifts_have_the_gradient_of_numbers_that_are_not_rounded(scheme: Scheme) -> None:
    """Finite differences: a shift by a whole step moves what is read by about one step."""
    learned = LearnedRounding(weight(), quantize(weight(), scheme))
    learned.read().sum().backward()
    with torch.no_grad():
        learned.shifts.fill_(-0.5)
        low = learned.read()
        learned.shifts.fill_(0.5)
        change = (learned.read() - low).view_as(learned.shifts)
    assert learned.shifts.grad is not None
    free = learned.shifts.grad != 0
    inner = free & ((change - learned.shifts.grad).abs() < 1e-5)
    assert inner.float().mean() > 0.6  # others cross an uneven step, or the end of the range
    assert free.float().mean() > 0.9


def test_gradients_of_scales_are_differences() -> None:
    learned = LearnedScales(quantize(weight(), Scheme(4, symmetric=False)))
    learned.read().square().sum().backward()
    for move in learned.moves:
        assert move.grad is not None
        ends = []
        for size in (-1e-2, 1e-2):
            with torch.no_grad():
                move[2, 0] = size
                ends.append(float(learned.read().double().square().sum()))
                move[2, 0] = 0
        slope = (ends[1] - ends[0]) / 2e-2
        assert slope == pytest.approx(float(move.grad[2, 0]), rel=1e-3)
