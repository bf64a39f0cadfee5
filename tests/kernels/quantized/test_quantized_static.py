"""Static activations: what a scale and a zero point mean, and how they are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantized_cases import SCHEMES, WIDTH, name
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.kernels.quantized import (
    QuantizedWeight,
    Scheme,
    Static,
    activation_ranges,
    conv,
    conv_paths,
    linear,
    quantize,
)
from graphopt.kernels.quantized.activation_ranges import find
from graphopt.kernels.quantized.autograd import quantized_linear

OUTPUTS = 24
GIVEN = Static(0.0234375, 101)
INTEGERS = [scheme for scheme in SCHEMES if scheme.dtype == "int"]
LIMITS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
WINDOW = conv_paths.Window((3, 2), (2, 1), (1, 1), (1, 2), 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def numbers(x: Tensor, given: Static = GIVEN) -> Tensor:
    """What is left of x, float64: the definition once more."""
    code = (x.double() / given.scale).round() + given.zero
    return (code.clamp(0, 255) - given.zero) * given.scale


def wanted(x: Tensor, weight: QuantizedWeight, bias: Tensor) -> Tensor:
    return numbers(x) @ weight.dequantize(torch.float64).t() + bias.double()


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("scheme", INTEGERS, ids=name)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_it_is_the_product_of_what_is_left(scheme: Scheme, dtype: torch.dtype) -> None:
    weight, bias = quantize(torch.randn(OUTPUTS, WIDTH), scheme), torch.randn(OUTPUTS).to(dtype)
    x = (2 * torch.randn(3, 5, WIDTH)).to(dtype)  # a part of it is beyond the range
    found = linear(x, weight, bias, "static", GIVEN)
    exact = wanted(x, weight, bias)
    assert found.dtype == dtype and off(found, exact) < LIMITS[dtype]
    wrong = linear(x, weight, bias, "static", Static(GIVEN.scale * 1.01, GIVEN.zero))
    assert off(wrong, exact) > 1.5 * LIMITS[dtype]
    assert off(linear(x, weight, bias, "static", Static(GIVEN.scale, 102)), exact) > 0.003


@pytest.mark.parametrize("zero", [0, 128, 255])
def test_numbers_beyond_the_range_saturate(zero: int) -> None:
    given, weight = Static(0.5, zero), quantize(torch.eye(4), Scheme())
    x = torch.tensor([[1e30, -1e30, 0.0, 0.25]])
    found = linear(x, weight, None, "static", given)
    low, high = given.range
    assert (low, high) == (-zero / 2, (255 - zero) / 2)
    torch.testing.assert_close(found, torch.tensor([[high, low, 0.0, 0.0]]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_do_not_become_finite(value: float) -> None:
    weight, x = quantize(torch.randn(OUTPUTS, WIDTH), Scheme()), torch.randn(3, WIDTH)
    x[1, 5] = value
    found = linear(x, weight, None, "static", GIVEN)
    assert not found[1].isfinite().any() and found[::2].isfinite().all()


@pytest.mark.parametrize("shape", [(WIDTH,), (0, WIDTH), (2, 0, 3, WIDTH)])
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    weight, x = quantize(torch.randn(OUTPUTS, WIDTH), Scheme()), torch.randn(shape)
    found = linear(x, weight, torch.zeros(OUTPUTS), "static", GIVEN)
    assert found.shape == (*shape[:-1], OUTPUTS)
    assert off(found, wanted(x, weight, torch.zeros(OUTPUTS))) < 1e-6 or not x.numel()


def test_pieces_of_a_weight_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(7, WIDTH), quantize(torch.randn(OUTPUTS, WIDTH), Scheme(4))
    whole = linear(x, weight, None, "static", GIVEN)
    monkeypatch.setattr("graphopt.kernels.quantized.static.HELD", 3 * WIDTH)
    torch.testing.assert_close(linear(x, weight, None, "static", GIVEN), whole)


def test_gradients_are_those_of_the_product() -> None:
    weight = quantize(torch.randn(OUTPUTS, WIDTH), Scheme())
    x, grad = torch.randn(3, WIDTH, requires_grad=True), torch.randn(3, OUTPUTS)
    linear(x, weight, None, "static", GIVEN).backward(grad)
    torch.testing.assert_close(x.grad, grad @ weight.dequantize())
    codes = weight.scales.clone().requires_grad_()
    stored = (weight.codes, codes, None, None, None, 8, "int", None, True)
    with pytest.raises(RuntimeError, match="has no gradient"):
        quantized_linear(x, *stored, "static", "plain", *GIVEN).sum().backward()


def test_fake_values_and_compilation() -> None:
    weight, x = quantize(torch.randn(OUTPUTS, WIDTH), Scheme()), torch.randn(5, WIDTH)

    def run(x: Tensor) -> Tensor:
        return linear(x.relu(), weight, None, "static", GIVEN)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), run(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert run(mode.from_tensor(x)).shape == (5, OUTPUTS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("static", None), "positive input_scale, not None"),
        (("static", Static(0.0, 3)), "positive input_scale, not 0.0"),
        (("static", Static(torch.inf, 3)), "positive input_scale, not inf"),
        (("static", Static(torch.nan, 3)), "positive input_scale, not nan"),
        (("static", Static(1.0, 256)), "input_zero is 0 to 255, not 256"),
        (("static", Static(1.0, -1)), "input_zero is 0 to 255, not -1"),
        (("dynamic", Static(1.0, 3)), "goes with activations='static', not 'dynamic'"),
    ],
    ids=str,
)
def test_bad_calls(arguments: Any, told: str) -> None:
    weight, x = quantize(torch.randn(OUTPUTS, WIDTH), Scheme()), torch.randn(2, WIDTH)
    with pytest.raises(ValueError, match=told):
        linear(x, weight, None, *arguments)
    moves = {**WINDOW._asdict(), "kernel": (1, 1)}
    with pytest.raises(ValueError, match=told):
        conv(
            x.view(1, WIDTH, 1, 2),
            weight,
            None,
            **moves,
            activations=arguments[0],
            static=arguments[1],
        )


def test_formats_without_integers_have_none() -> None:
    weight = quantize(torch.randn(OUTPUTS, WIDTH), Scheme(8, "fp8"))
    with pytest.raises(ValueError, match="fp8 has no static activations: dtype int has"):
        linear(torch.randn(2, WIDTH), weight, None, "static", GIVEN)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(4, symmetric=False)], ids=name)
@pytest.mark.parametrize("zero", [0, 101, 128, 255])
def test_every_path_of_convolutions(scheme: Scheme, zero: int) -> None:
    given = Static(0.0234375, zero)
    weight = quantize(torch.randn(12, 6 * 8), scheme)
    x, bias = torch.randn(3, 8, 9, 7), torch.randn(12)
    moves = [*WINDOW[1:4], False, [0, 0], 1]
    held = weight.dequantize(torch.float64).view(12, 3, 2, 8).movedim(-1, 1)
    exact = torch.convolution(numbers(x, given), held, bias.double(), *moves)
    case = conv_paths.Case(scheme, "static", x.dtype, "cpu", WINDOW, 12, tuple(x.shape))
    taken = [run for takes, run in conv_paths.STATIC_PATHS.values() if takes(case)]
    assert len(taken) >= 2
    broken = x.clone()
    broken[1, 2, 3, 4] = torch.nan
    for run in taken:
        assert off(run(x.clone(), weight, bias, WINDOW, given), exact) < 1e-6
        assert off(run(x.clone(), weight, bias, WINDOW, Static(0.02367, zero)), exact) > 1e-4
        found = run(broken.clone(), weight, None, WINDOW, given)
        assert found[::2].isfinite().all() and not found[1].isfinite().any()
    found = conv(x, weight, bias, **WINDOW._asdict(), activations="static", static=given)
    assert off(found, exact) < 1e-6
    empty = conv(x[:0], weight, bias, **WINDOW._asdict(), activations="static", static=given)
    assert empty.shape == (0, *found.shape[1:])


def error(x: Tensor, given: Static | None) -> float:
    assert given is not None
    return off(numbers(x, given), x.double())


def test_the_range_with_the_least_error_is_found() -> None:
    x = torch.randn(64, WIDTH)
    x[3, 4] = 40.0  # one number makes every step twelve times as large
    found = {kind: find(lambda: [x], kind) for kind in ("mse", "minmax", "percentile", 99.0)}
    errors = {kind: float((numbers(x, s) - x).square().sum()) for kind, s in found.items() if s}
    assert errors["mse"] <= min(errors.values())
    many = torch.randn(256, WIDTH)
    many[::2, 0] *= 1e-3
    many[7, 5] = 40.0
    chosen = find(lambda: [many, many], "mse")
    ends = [0.25 * n for n in range(8, 24)]
    tried = [activation_ranges.between(-a, b) for a in ends for b in (*ends, 40.0)]
    least = min(error(many, given) for given in tried)
    assert error(many, chosen) < 1.02 * least
    assert error(many, chosen) < error(many, find(lambda: [many], "minmax"))
    assert error(many.clamp(-4, 4), find(lambda: [many], "percentile")) < 0.02


def test_a_percentile_cuts_both_ends_off() -> None:
    x = torch.cat([torch.linspace(-1, 2, 3001), torch.tensor([-50.0, 90.0])])[:, None]
    low, high = find(lambda: [x], 98.0).range
    assert abs(low + 0.97) < 0.03 and abs(high - 1.97) < 0.03


def test_numbers_count_by_the_weights_they_meet() -> None:
    """A column that no weight reads says nothing of the range."""
    x = torch.randn(256, WIDTH)
    x[:, 0] *= 30
    importance = torch.ones(WIDTH)
    importance[0] = 0.0
    given = find(lambda: [x], "mse", importance)
    assert given is not None and given.range[1] < 8
    plain = find(lambda: [x], "mse")
    assert plain is not None and plain.range[1] > 30


def test_ranges_hold_zero_and_positive_numbers_use_every_code() -> None:
    x = torch.rand(32, WIDTH) + 3
    for kind in ("mse", "minmax", "percentile"):
        given = find(lambda: [x], kind)
        assert given is not None and given.zero == 0 and 3.9 < given.range[1] < 4.1
        given = find(lambda: [-x], kind)
        assert given is not None and given.zero == 255
    assert find(lambda: [x * 1e-44], "minmax") is not None  # too small for float32 to divide


def test_no_numbers_show_no_range() -> None:
    assert find(list, "mse") is None
    assert find(lambda: [torch.zeros(3, 4), torch.empty(0, 4)], "mse") is None
    with pytest.raises(ValueError, match=r"calibration\[1\] gives NaN or infinity"):
        find(lambda: [torch.ones(2), torch.tensor([1.0, torch.nan])], "mse")
    with pytest.raises(ValueError, match=r"calibration\[0\] gives NaN or infinity"):
        find(lambda: [torch.tensor([1.0, -torch.inf])], "mse")
