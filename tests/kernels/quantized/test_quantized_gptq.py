"""GPTQ and what refines it: against the algorithm as published, and against every single change."""

from __future__ import annotations

import pytest
import torch
from quantized_cases import SCHEMES, WIDTH, name
from torch import Tensor

from graphopt.kernels.quantized import QuantizedWeight, Scheme, gptq, quantize
from graphopt.kernels.quantized.codes import snap
from graphopt.kernels.quantized.gptq import Settings, damped
from graphopt.kernels.quantized.refine import Rounded, errors, refined

PLAIN = Settings(ordered=False, refinements=0)


def problem(outputs: int = 24, width: int = WIDTH, rows: int = 400) -> tuple[Tensor, Tensor]:
    """A weight, and the moment of inputs that are correlated and of unequal size."""
    torch.manual_seed(0)
    mixed = torch.randn(width, width) * torch.rand(width) * 2
    x = torch.randn(rows, width) @ mixed / width**0.5
    return torch.randn(outputs, width) / 8, x.t() @ x


def loss(weight: Tensor, moment: Tensor, made: QuantizedWeight) -> float:
    """Relative error of the products."""
    off = made.dequantize() - weight
    return float(((off @ moment * off).sum() / (weight @ moment * weight).sum()).sqrt())


def published(weight: Tensor, moment: Tensor, scale: Tensor) -> Tensor:
    """Numbers after rounding, one column after the other, by the inverse itself (float64)."""
    left = weight.double().clone()
    inverse = torch.linalg.inv(damped(moment.double(), 0.01))
    scheme = Scheme(4)
    for k in range(left.shape[1]):
        rounded = snap(left[:, k : k + 1].float(), scale, None, scheme).double()[:, 0]
        lost = (left[:, k] - rounded) / inverse[k, k]
        left -= lost[:, None] * inverse[k]
        left[:, k] = rounded
        inverse -= torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return left


def test_codes_are_those_of_the_algorithm() -> None:
    weight, moment = problem()
    made = gptq(weight, Scheme(4), moment, "none", PLAIN)
    wanted = published(weight, moment, made.scales)
    same = (made.dequantize(torch.float64) - wanted).abs() < made.scales.double().abs() / 2
    assert same.double().mean() > 0.998


def test_blocks_do_not_matter() -> None:
    weight, moment = problem()
    for scheme in (Scheme(4), Scheme(3, group_size=32, symmetric=False)):
        one, two = (
            gptq(weight, scheme, moment, "search", Settings(refinements=0, block=b))
            for b in (128, 7)
        )
        assert (one.codes == two.codes).double().mean() > 0.99


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_products_are_nearer_than_by_rounding(scheme: Scheme) -> None:
    weight, moment = problem()
    nearest = loss(weight, moment, quantize(weight, scheme, "search"))
    first = loss(weight, moment, gptq(weight, scheme, moment, settings=Settings(refinements=0)))
    last = loss(weight, moment, gptq(weight, scheme, moment))
    assert first < 0.8 * nearest
    assert last < first


def test_a_wrong_moment_shows() -> None:
    """The gain comes from the correlations of these inputs, and not from any others."""
    weight, moment = problem()
    mine = loss(weight, moment, gptq(weight, Scheme(4), moment))
    other = loss(weight, moment, gptq(weight, Scheme(4), moment.flip(0).flip(1).contiguous()))
    assert mine < 0.6 * other


def test_order_is_stored_as_it_was() -> None:
    """Columns are rounded in another order; a weight that is on the grid comes back exactly."""
    _, moment = problem()
    for scheme in (Scheme(4, group_size=32), Scheme(4, group_size=32, symmetric=False)):
        codes = torch.randint(-8, 8, (5, WIDTH))
        codes.view(5, -1, 32)[..., :2] = torch.tensor([-8, 7])
        scale = (torch.rand(5, WIDTH // 32, 1) + 0.5).half().float()
        weight = (codes.view(5, -1, 32) * scale).flatten(1)
        made = gptq(weight, scheme, moment, "none")
        assert torch.allclose(made.dequantize(), weight, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "scheme", [Scheme(3), Scheme(2, group_size=8, symmetric=False), Scheme(4, "nf4", 8)], ids=name
)
def test_no_single_change_improves_what_is_refined(scheme: Scheme) -> None:
    weight, moment = problem(6, 16)
    weight, groups = weight.t().contiguous(), scheme.groups(16)
    moment = damped(moment, 0.01)
    top = (weight.view(groups, -1, 6).abs().amax(1) / 2).contiguous()
    zeros = None if scheme.symmetric else torch.full_like(top, 0.25)
    codes = torch.zeros(16, 6, dtype=torch.int8 if scheme.dtype == "int" else torch.uint8)
    found = refined(weight, moment, Rounded(codes, top, zeros), scheme, 30)
    least = errors(weight, moment, found, scheme)
    low, high = (0, 15) if scheme.dtype != "int" else scheme.limits
    for k in range(16):
        for step in (-1, 1):
            other = found.codes.clone()
            other[k] = (other[k].int() + step).clamp(low, high).to(other.dtype)
            worse = errors(weight, moment, found._replace(codes=other), scheme)
            assert bool((worse >= least * (1 - 1e-4)).all())
    for group in range(groups):
        for factor in (0.98, 1.02):
            scales = found.scales.clone()
            scales[group] *= factor
            worse = errors(weight, moment, found._replace(scales=scales), scheme)
            assert bool((worse >= least * (1 - 1e-4)).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_refining_never_makes_a_channel_worse(scheme: Scheme) -> None:
    weight, moment = problem()
    found = [
        gptq(weight, scheme, moment, settings=Settings(refinements=n)).dequantize() - weight
        for n in (0, 1, 3)
    ]
    one, two, three = ((off @ damped(moment, 0.01) * off).sum(1) for off in found)
    assert bool((two <= one * 1.001).all())
    assert bool((three <= two * 1.001).all())


def test_inputs_that_were_never_seen() -> None:
    weight, moment = problem()
    moment[5], moment[:, 5] = 0.0, 0.0
    made = gptq(weight, Scheme(4), moment)
    assert made.dequantize().isfinite().all()
    off = (made.dequantize() - weight)[:, 5].abs() / made.scales[:, 0].abs()
    assert bool((off <= 0.51).all() | (weight[:, 5].abs() > 7 * made.scales[:, 0].abs()).any())


def test_all_inputs_alike() -> None:
    """A moment of rank 1, and one of zeros."""
    weight, _ = problem()
    ones = torch.ones(WIDTH, WIDTH)
    for moment in (ones, torch.zeros_like(ones)):
        assert gptq(weight, Scheme(4), moment).dequantize().isfinite().all()


def test_refusals() -> None:
    weight, moment = problem()
    with pytest.raises(ValueError, match=r"moment is \(3, 3\); the weight has K = 96"):
        gptq(weight, Scheme(4), torch.eye(3))
    with pytest.raises(ValueError, match="holds NaN, infinity"):
        gptq(weight, Scheme(4), moment / 0)
    with pytest.raises(ValueError, match="NaN or infinity"):
        gptq(weight / 0, Scheme(4), moment)
    with pytest.raises(ValueError, match="group"):
        gptq(weight, Scheme(4, group_size=64), moment)
