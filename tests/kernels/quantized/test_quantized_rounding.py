"""Round to nearest: errors by scheme, clipping search, awkward weights."""

from __future__ import annotations

import pytest
import torch
from quantized_cases import SCHEMES, WIDTH, error, name

from graphopt.kernels.quantized import Scheme, find_scales, hqq, quantize
from graphopt.kernels.quantized.codes import snap
from graphopt.kernels.quantized.hqq import Splitting
from graphopt.kernels.quantized.ranges import grid

PLAIN = [
    (Scheme(), 0.0079),
    (Scheme(symmetric=False), 0.0074),
    (Scheme(6), 0.031),
    (Scheme(4), 0.126),
    (Scheme(4, group_size=64), 0.095),
    (Scheme(4, group_size=32), 0.086),
    (Scheme(4, group_size=32, symmetric=False), 0.078),
    (Scheme(3, group_size=64), 0.192),
    (Scheme(2, group_size=32), 0.362),
    (Scheme(4, "nf4", 64), 0.092),
    (Scheme(4, "fp4", 64), 0.106),
    (Scheme(8, "fp8"), 0.0264),
    (Scheme(4, "mxfp4"), 0.115),
    (Scheme(4, "nvfp4"), 0.095),
]
SEARCHED = [
    (Scheme(4), 0.1065),
    (Scheme(4, group_size=64), 0.0903),
    (Scheme(4, group_size=32, symmetric=False), 0.0756),
    (Scheme(3, group_size=64, symmetric=False), 0.172),
    (Scheme(2, group_size=32), 0.332),
    (Scheme(2, group_size=32, symmetric=False), 0.312),
    (Scheme(4, "nf4", 64), 0.0866),
    (Scheme(4, "mxfp4"), 0.1115),
    (Scheme(4, "nvfp4"), 0.0884),
]
"""Relative errors on numbers from the normal distribution, K = 1152."""


@pytest.mark.parametrize(("scheme", "wanted"), PLAIN, ids=[name(s) for s, _ in PLAIN])
def test_error_without_clipping(scheme: Scheme, wanted: float) -> None:
    weight = torch.randn(256, 1152)
    assert error(weight, quantize(weight, scheme)) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(("scheme", "wanted"), SEARCHED, ids=[name(s) for s, _ in SEARCHED])
def test_error_of_a_search(scheme: Scheme, wanted: float) -> None:
    weight = torch.randn(128, 1152)
    assert error(weight, quantize(weight, scheme, "search")) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_a_search_is_never_worse_in_any_group(scheme: Scheme) -> None:
    weight = torch.randn(8, WIDTH) ** 3
    plain, searched = quantize(weight, scheme), quantize(weight, scheme, "search")
    groups = (8, scheme.groups(WIDTH), -1)
    was = (plain.dequantize() - weight).view(groups).square().sum(-1)
    now = (searched.dequantize() - weight).view(groups).square().sum(-1)
    assert (now <= was * 1.005 + 1e-9).all()  # scales are rounded to float16 afterwards


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.dtype == "int"], ids=name)
def test_no_number_is_further_than_half_a_step(scheme: Scheme) -> None:
    """Without clipping, of integers; the largest symmetric code above zero is a step short."""
    weight = torch.randn(8, WIDTH)
    made = quantize(weight, scheme)
    steps = made.scales.float().abs().repeat_interleave(WIDTH // made.scales.shape[1], 1)
    share = 1.0 if scheme.offset and scheme.symmetric else 0.5
    assert ((made.dequantize() - weight).abs() <= steps * share * 1.02).all()


def test_the_search_takes_the_best_of_its_grid() -> None:
    scheme = Scheme(3)
    groups = torch.randn(20, 1, 64)
    scales, _ = find_scales(groups, scheme, search=True)
    found = (snap(groups, scales, None, scheme) - groups).square().sum(-1)
    extreme = groups.abs().amax(-1, keepdim=True)
    for factor in grid(scheme):
        for sign in (1, -1):
            other = snap(groups, extreme * factor * sign / 4, None, scheme)
            assert (found <= (other - groups).square().sum(-1) + 1e-6).all()


def test_importance_is_what_the_search_minimises() -> None:
    scheme = Scheme(3, group_size=32, symmetric=False)
    weight = torch.randn(64, WIDTH)
    importance = torch.rand(WIDTH) ** 8 * 100
    plain = quantize(weight, scheme, "search").dequantize() - weight
    weighed = quantize(weight, scheme, "search", importance).dequantize() - weight
    assert (weighed.square() * importance).sum() < 0.9 * (plain.square() * importance).sum()
    same = quantize(weight, scheme, "search", torch.full((WIDTH,), 3.0)).dequantize() - weight
    assert torch.allclose(same, plain)


def test_full_range_beats_the_restricted_one() -> None:
    """Of 16 codes, 15 are symmetric about zero: the largest magnitude takes the sixteenth."""
    weight = torch.randn(64, 512)
    top = weight.abs().amax(1, keepdim=True) / 7
    restricted = (weight / top).round() * top - weight
    assert error(weight, quantize(weight, Scheme(4))) < 0.9 * restricted.norm() / weight.norm()


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
@pytest.mark.parametrize("clip", ["none", "search"])
def test_zeros_stay_zeros(scheme: Scheme, clip: str) -> None:
    weight = torch.randn(4, WIDTH)
    weight[1] = 0
    made = quantize(weight, scheme, clip).dequantize()
    assert (made[1] == 0).all() and made.isfinite().all()
    assert (quantize(torch.zeros(2, WIDTH), scheme, clip).dequantize() == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
@pytest.mark.parametrize("magnitude", [1e-12, 1e-5, 1e6, 1e12])
def test_magnitudes_do_not_matter(scheme: Scheme, magnitude: float) -> None:
    weight = torch.randn(16, WIDTH, dtype=torch.float64)
    wanted = error(weight, quantize(weight, scheme))
    assert error(weight * magnitude, quantize(weight * magnitude, scheme)) == pytest.approx(
        wanted, rel=0.15 if scheme.dtype == "mxfp4" else 0.01
    )


def test_scales_of_groups_are_half_precision_where_that_holds_them() -> None:
    scheme = Scheme(4, group_size=32)
    assert quantize(torch.randn(4, WIDTH), scheme).scales.dtype == torch.float16
    assert quantize(torch.randn(4, WIDTH) * 1e-5, scheme).scales.dtype == torch.float32
    assert quantize(torch.randn(4, WIDTH), Scheme(4)).scales.dtype == torch.float32


def test_a_group_on_one_side_of_zero_keeps_its_zero_point_small() -> None:
    weight = 10 + torch.rand(4, WIDTH) / 10
    made = quantize(weight, Scheme(8, group_size=32, symmetric=False))
    assert made.zeros is not None and made.zeros.abs().max() <= 128
    assert error(weight, made) < 0.003


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_float(dtype: torch.dtype) -> None:
    weight = torch.randn(8, WIDTH).to(dtype).requires_grad_()
    made = quantize(weight, Scheme(4, "nvfp4"))
    assert not any(t.requires_grad for t in made.tensors.values())
    assert torch.equal(
        made.dequantize(), quantize(weight.detach().float(), made.scheme).dequantize()
    )


def test_weights_in_any_memory_and_without_rows() -> None:
    weight = torch.randn(WIDTH, 10).t()[::2]
    for scheme in SCHEMES:
        made = quantize(weight, scheme)
        assert torch.equal(made.dequantize(), quantize(weight.contiguous(), scheme).dequantize())
        assert quantize(weight[:0], scheme, "search").dequantize().shape == (0, WIDTH)


def test_what_cannot_be_quantized_is_refused() -> None:
    weight = torch.randn(4, WIDTH)
    broken = weight.clone()
    broken[2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(broken, Scheme())
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(weight * torch.inf, Scheme())
    with pytest.raises(ValueError, match="matrix"):
        quantize(weight[0], Scheme())
    with pytest.raises(ValueError, match="matrix"):
        quantize(weight.int(), Scheme())
    with pytest.raises(ValueError, match="clip='search'"):
        quantize(weight, Scheme(), importance=torch.ones(WIDTH))
    with pytest.raises(ValueError, match="K = 96"):
        quantize(weight, Scheme(), "search", torch.ones(4))
    with pytest.raises(ValueError, match="not negative"):
        quantize(weight, Scheme(), "search", -torch.ones(WIDTH))
    with pytest.raises(ValueError, match="'none' or 'search'"):
        quantize(weight, Scheme(), "mse")


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.985), (3, 0.97), (2, 0.96)])
def test_hqq_lowers_its_norm(bits: int, gain: float) -> None:
    scheme = Scheme(bits, group_size=32, symmetric=False)
    weight = torch.randn(64, WIDTH) ** 3 / 50
    for clip in ("none", "search"):
        was = (quantize(weight, scheme, clip).dequantize() - weight).abs().pow(0.7).sum()
        now = (hqq(weight, scheme, clip).dequantize() - weight).abs().pow(0.7).sum()
        assert now < gain * was


def test_shrinking_residuals_is_better_than_their_mean() -> None:
    """A beta of almost zero shrinks all of them to zero: least squares."""
    scheme = Scheme(4, group_size=32, symmetric=False)
    weight = torch.randn(128, WIDTH) ** 3 / 50
    norms = [
        (hqq(weight, scheme, "none", Splitting(beta=beta)).dequantize() - weight)
        .abs()
        .pow(0.7)
        .sum()
        for beta in (10.0, 1e-9)
    ]
    assert norms[0] < 0.97 * norms[1]


def test_hqq_needs_zero_points() -> None:
    with pytest.raises(ValueError, match="symmetric=False"):
        hqq(torch.randn(4, WIDTH), Scheme(4))
    with pytest.raises(ValueError, match="NaN"):
        hqq(torch.full((4, WIDTH), torch.nan), Scheme(4, symmetric=False))
