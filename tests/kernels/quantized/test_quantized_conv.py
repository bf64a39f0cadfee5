"""Quantized convolutions: paths against each other and against float, gradients, bad calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.kernels.quantized import QuantizedWeight, Scheme, conv, conv_paths, quantize

BATCH, INPUTS, OUTPUTS = 3, 8, 12
SIZES = (9, 8, 7)
WINDOWS = {
    "plain": ((3, 2, 3), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
    "moved": ((3, 2, 3), (2, 1, 3), (1, 0, 2), (1, 2, 1)),
    "pointwise": ((1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
}
SCHEMES = [Scheme(), Scheme(4, symmetric=False), Scheme(6), Scheme(8, "fp8")]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def window(kind: str, dims: int, groups: int = 1) -> conv_paths.Window:
    return conv_paths.Window(*(part[:dims] for part in WINDOWS[kind]), groups)


def made(scheme: Scheme, moves: conv_paths.Window) -> QuantizedWeight:
    numbers = torch.randn(OUTPUTS, *moves.kernel, INPUTS // moves.groups)
    return quantize(numbers.flatten(1), scheme)


def call(x: Tensor, weight: QuantizedWeight, moves: conv_paths.Window, **options: Any) -> Tensor:
    return conv(x, weight, **{**moves._asdict(), **options})


def inputs(dims: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, INPUTS, *SIZES[:dims], dtype=dtype)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_path_gives_the_definition(dims: int, kind: str, scheme: Scheme) -> None:
    moves, bias = window(kind, dims), torch.randn(OUTPUTS)
    weight, x = made(scheme, moves), inputs(dims)
    case = conv_paths.Case(scheme, "dynamic", x.dtype, "cpu", moves, OUTPUTS, tuple(x.shape))
    wanted = conv_paths.dynamic(x, weight, bias, moves)
    for takes, run in conv_paths.PATHS.values():
        if takes(case):
            torch.testing.assert_close(run(x, weight, bias, moves), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        call(x, weight, moves, bias=bias, activations="dynamic"), wanted, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_it_is_near_the_convolution(groups: int, activations: str) -> None:
    moves = window("moved", 2, groups)
    weight, x = made(Scheme(), moves), inputs(2)
    numbers = weight.dequantize().view(OUTPUTS, *moves.kernel, -1).movedim(-1, 1)
    wanted = torch.nn.functional.conv2d(x, numbers, None, *moves[1:])
    off = (call(x, weight, moves, activations=activations) - wanted).norm() / wanted.norm()
    assert off < (1e-6 if activations == "none" else 0.015)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    moves = window("moved", 2)
    weight, x = made(Scheme(), moves), inputs(2)
    x[1] *= 1000
    for _, run in conv_paths.PATHS.values():
        alone = run(x[:1], weight, None, moves)
        torch.testing.assert_close(run(x, weight, None, moves)[:1], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    moves = window("moved", 2)
    weight, x = made(Scheme(), moves), inputs(2, dtype)
    wanted = conv_paths.dynamic(x.double(), weight, None, moves)
    for activations in ("none", "dynamic"):
        found = call(x, weight, moves, activations=activations)
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() / wanted.norm() < 0.02


def test_channels_last_stay_so() -> None:
    moves = window("moved", 2)
    weight, x = made(Scheme(), moves), inputs(2)
    last = call(x.to(memory_format=torch.channels_last), weight, moves, activations="dynamic")
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, call(x, weight, moves, activations="dynamic"))


def test_gradients_are_those_of_the_convolution() -> None:
    moves = window("moved", 2, 2)
    weight = made(Scheme(4), moves)
    x = inputs(2, torch.float64).requires_grad_()
    bias = torch.randn(OUTPUTS, dtype=torch.float64, requires_grad=True)
    numbers = conv_paths.numbers(weight, moves, torch.float64)
    results = (call(x, weight, moves, bias=bias), conv_paths.convolution(x, numbers, bias, moves))
    pull = torch.randn_like(results[0]).requires_grad_()
    first, second = (torch.autograd.grad(y, (x, bias), pull, create_graph=True) for y in results)
    torch.testing.assert_close(first, second)
    again = [torch.autograd.grad(g[0].sin().sum(), pull)[0] for g in (first, second)]
    torch.testing.assert_close(*again)


def test_registrations_hold() -> None:
    moves = window("moved", 2)
    weight, x = made(Scheme(4), moves), inputs(2).requires_grad_()
    settings = ([*map(list, moves[:4])], 1, 4, "int", None, True, "none")
    stored = (weight.codes, weight.scales, None, None, torch.randn(OUTPUTS))
    torch.library.opcheck(
        torch.ops.graphopt.quantized_conv.default, (x, *stored, *settings[0], *settings[1:])
    )


def test_a_library_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(
        q: Tensor, codes: Tensor, scales: Tensor, moves: conv_paths.Window, zero: int = 128
    ) -> Tensor:
        numbers = codes.view(len(codes), *moves.kernel, -1).movedim(-1, 1).float()
        return conv_paths.convolution(q, numbers, None, moves).clamp(-(2**20), 2**20)

    conv_paths.onednn_is_exact.cache_clear()
    monkeypatch.setattr(conv_paths, "unsigned_convolution", saturating)
    assert not conv_paths.onednn_is_exact()
    conv_paths.onednn_is_exact.cache_clear()


def test_numbers_that_are_not_finite_do_not_become_finite() -> None:
    moves = window("pointwise", 2)
    weight, x = made(Scheme(), moves), inputs(2)
    x[1, 2, 3, 4] = torch.nan
    for _, run in conv_paths.PATHS.values():
        found = run(x.clone(), weight, None, moves)
        assert found[0].isfinite().all() and not found[1].isfinite().any()


def test_an_empty_batch() -> None:
    moves = window("moved", 2)
    assert call(inputs(2)[:0], made(Scheme(), moves), moves, activations="dynamic").shape[0] == 0


@pytest.mark.parametrize(
    ("x", "options", "reason"),
    [
        (torch.ones(3, 8, 9), {}, "as many numbers in each"),
        (torch.ones(3, 9, 9, 8), {"groups": 2}, "2 groups do not divide"),
        (torch.ones(3, 9, 9, 8), {}, "codes are"),
        (torch.ones(3, 8, 9, 8), {"bias": torch.ones(3)}, "12 output channels"),
        (torch.ones(3, 8, 9, 8), {"activations": "fixed"}, "not one of none, dynamic, static"),
    ],
)
def test_calls_that_do_not_fit(x: Tensor, options: dict[str, Any], reason: str) -> None:
    moves = window("moved", 2)
    with pytest.raises(ValueError, match=reason):
        call(x, made(Scheme(), moves), moves, **options)
