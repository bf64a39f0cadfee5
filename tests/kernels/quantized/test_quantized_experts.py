"""Rows of experts by their own weights: against each expert's product, gradients, bad calls."""

from __future__ import annotations

import pytest
import torch
from quantized_cases import SCHEMES, WIDTH, name
from torch import Tensor

from graphopt.kernels.quantized import Scheme, experts, quantize

COUNT, OUTPUTS, ROWS = 4, 24, 17
ENDS = torch.tensor([3, 3, 10, 15])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def by_hand(x: Tensor, matrices: Tensor, ends: Tensor = ENDS) -> Tensor:
    made, start = x.new_zeros(len(x), matrices.shape[1]), 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        made[start:end] = x[start:end] @ matrix.T
        start = end
    return made


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_expert_has_its_rows(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = quantize(torch.randn(COUNT * OUTPUTS, WIDTH), scheme)
    x = torch.randn(ROWS, WIDTH, dtype=dtype)
    made = experts(x, weight, COUNT, ENDS.int())
    matrices = weight.dequantize(dtype).view(COUNT, OUTPUTS, WIDTH)
    assert made.dtype == dtype and torch.equal(made[15:], made.new_zeros(2, OUTPUTS))
    wanted = by_hand(x, matrices)
    assert (made - wanted).norm() < 4 * torch.finfo(dtype).eps * wanted.norm()


def test_activations_have_a_scale_for_each_row() -> None:
    weight = quantize(torch.randn(COUNT * OUTPUTS, WIDTH), Scheme())
    x = torch.randn(ROWS, WIDTH) * torch.logspace(-3, 3, ROWS)[:, None]
    made = experts(x, weight, COUNT, ENDS, "dynamic")
    wanted = by_hand(x, weight.dequantize().view(COUNT, OUTPUTS, WIDTH))
    off = (made - wanted)[:15].norm(dim=1) / wanted[:15].norm(dim=1)
    assert 1e-4 < float(off.max()) < 0.03


def test_without_offsets_experts_have_equally_many_rows() -> None:
    weight = quantize(torch.randn(COUNT * OUTPUTS, WIDTH), Scheme(4))
    x = torch.randn(COUNT, 5, WIDTH)
    made = experts(x.flatten(0, 1), weight, COUNT).view(COUNT, 5, OUTPUTS)
    matrices = weight.dequantize().view(COUNT, OUTPUTS, WIDTH)
    torch.testing.assert_close(made, torch.bmm(x, matrices.mT))


def test_gradients_are_those_of_the_products() -> None:
    weight = quantize(torch.randn(COUNT * OUTPUTS, WIDTH), Scheme(4, group_size=32))
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    matrices = weight.dequantize(torch.float64).view(COUNT, OUTPUTS, WIDTH)
    pull = torch.randn(ROWS, OUTPUTS, dtype=torch.float64, requires_grad=True)
    found, wanted = (
        torch.autograd.grad(y, x, pull, create_graph=True)[0]
        for y in (experts(x, weight, COUNT, ENDS), by_hand(x, matrices))
    )
    torch.testing.assert_close(found, wanted)
    again = torch.autograd.grad(found, pull, torch.ones_like(found))[0]
    torch.testing.assert_close(again, by_hand(torch.ones_like(x), matrices))


def test_registrations_hold() -> None:
    weight = quantize(torch.randn(COUNT * OUTPUTS, WIDTH), Scheme(4))
    call = (torch.randn(ROWS, WIDTH, requires_grad=True), ENDS, weight.codes, weight.scales)
    scheme = (COUNT, 4, "int", None, True, "none")
    torch.library.opcheck(
        torch.ops.graphopt.quantized_experts.default, (*call, None, None, *scheme)
    )


def test_autocast_is_that_of_a_product() -> None:
    weight = quantize(torch.randn(COUNT * OUTPUTS, WIDTH), Scheme(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert experts(torch.randn(ROWS, WIDTH), weight, COUNT, ENDS).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rows", "count", "ends", "reason"),
    [
        (17, 4, [3, 2, 10, 15], "do not rise"),
        (14, 4, [3, 3, 10, 15], "do not rise"),
        (17, 4, [3, 3, 10], r"offsets are int32 or int64 \(4,\)"),
        (17, 4, None, "not equally many"),
        (17, 5, [3, 3, 10, 15, 16], "are not those of 5 experts"),
    ],
)
def test_calls_that_do_not_fit(rows: int, count: int, ends: list[int] | None, reason: str) -> None:
    weight = quantize(torch.randn(COUNT * OUTPUTS, WIDTH), Scheme())
    offsets = None if ends is None else torch.tensor(ends)
    with pytest.raises(ValueError, match=reason):
        experts(torch.randn(rows, WIDTH), weight, count, offsets)


def test_stored_tensors_have_no_gradient() -> None:
    weight = quantize(torch.randn(COUNT * OUTPUTS, WIDTH), Scheme(4))
    weight.scales.requires_grad_()
    made = experts(torch.randn(ROWS, WIDTH, requires_grad=True), weight, COUNT, ENDS)
    with pytest.raises(RuntimeError, match="no gradient for its scales"):
        made.sum().backward()
