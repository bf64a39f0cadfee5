"""The Triton kernels under Triton's interpreter: run by `test_triton_interpreted`.

Apart from other tests, in a process that has ``TRITON_INTERPRET=1`` before Triton is imported.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from interpreting import scalars_of_one_number  # noqa: F401 - a fixture of all cases
from quantized_cases import SCHEMES, name
from torch import Tensor

from graphopt.kernels.quantized import (
    QuantizedWeight,
    Scheme,
    choice,
    definition,
    embedding,
    linear,
    paths,
    quantize,
    triton_configs,
    triton_dynamic,
    triton_launch,
    triton_numbers,
    triton_weight_only,
    using,
)
from graphopt.kernels.quantized.autograd import quantized_linear
from graphopt.kernels.quantized.cases import Case
from graphopt.kernels.quantized.trials import STATIC, wide_product

assert os.environ.get("TRITON_INTERPRET") == "1"
ROWS = {torch.float32: (3, 40), torch.float16: (40,), torch.bfloat16: (3,)}
LIMITS = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 5e-3}
"""Relative errors. The interpreter cuts bfloat16 off where a GPU rounds it."""
MORE = [
    Scheme(4, group_size=64, symmetric=False),
    Scheme(4, group_size=128),
    Scheme(3, group_size=32),
    Scheme(3, group_size=64, symmetric=False),
    Scheme(6, group_size=64),
    Scheme(2, group_size=32),
    Scheme(8, group_size=96, symmetric=False),
    Scheme(4, "nf4", 64),
    Scheme(4, "fp4", 32),
]
DYNAMIC = [s for s in SCHEMES + MORE if s.dtype in ("int", "fp8") and (s.group_size or 0) % 32 == 0]
FEW_ROWS = [1, 2, 7, 16, 17]


@pytest.fixture(autouse=True)
def no_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests are about runs by Triton or not at all."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the definition ran")

    plain = [
        p._replace(run=refuse) if p.name in ("definition", "dynamic", "static") else p
        for p in paths.PATHS
    ]
    monkeypatch.setattr(paths, "PATHS", tuple(plain))
    monkeypatch.setattr(paths, "_found", {})


def width_of(scheme: Scheme) -> int:
    """K with an end that no step divides, in rows of whole words."""
    if scheme.group_size is None:
        return 352
    few = 3 * scheme.group_size
    return few if scheme.row_codes(few) % 4 == 0 else 2 * few


def made(scheme: Scheme, outputs: int = 37, width: int | None = None) -> QuantizedWeight:
    return quantize(torch.randn(outputs, width or width_of(scheme)), scheme)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def assert_close(found: Tensor, x: Tensor, weight: QuantizedWeight, bias: Any, how: str) -> None:
    wanted = wide_product(x, weight, bias, how)
    assert found.dtype == x.dtype and found.shape == wanted.shape
    assert off(found, wanted) < LIMITS[x.dtype]


@pytest.mark.parametrize("scheme", SCHEMES + MORE, ids=name)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_weight_only(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = made(scheme)
    for rows in ROWS[dtype]:
        x, bias = torch.randn(rows, weight.width).to(dtype), torch.randn(37).to(dtype)
        with using("weight_only"):
            assert_close(linear(x, weight, bias), x, weight, bias, "none")


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("scheme", [Scheme(4, group_size=64), Scheme(3, symmetric=False)], ids=name)
def test_few_rows(scheme: Scheme, rows: int) -> None:
    for outputs in (1, 31, 64):
        weight = made(scheme, outputs)
        x = torch.randn(rows, weight.width).half()
        with using("weight_only"):
            assert_close(linear(x, weight), x, weight, None, "none")


@pytest.mark.parametrize("scheme", DYNAMIC, ids=name)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_dynamic(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = made(scheme)
    for rows in ROWS[dtype]:
        x, bias = torch.randn(rows, weight.width).to(dtype), torch.randn(37).to(dtype)
        with using("dynamic_rows"):
            assert_close(linear(x, weight, bias, "dynamic"), x, weight, bias, "dynamic")


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (Scheme(), torch.float32),
        (Scheme(symmetric=False), torch.bfloat16),
        (Scheme(4, group_size=64, symmetric=False), torch.float32),
    ],
    ids=str,
)
def test_static_dynamic(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = made(scheme)
    x, bias = torch.randn(17, weight.width).to(dtype), torch.randn(37).to(dtype)
    with using("static_rows"):
        found = linear(x, weight, bias, "static", STATIC)
        assert_close(found, x, weight, bias, "static")
        assert off(found, wide_product(x, weight, bias, "static") * 1.01) > 0.008
        x[3, 5], x[4, 6], x[5, 7] = torch.nan, torch.inf, -1e30
        found = linear(x, weight, None, "static", STATIC._replace(zero=128))
    assert not found[3:5].isfinite().any() and found[5:].isfinite().all()


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(8, "fp8")], ids=name)
def test_dynamic_few_rows(scheme: Scheme, rows: int) -> None:
    for outputs in (1, 31, 64):
        weight = made(scheme, outputs)
        x = torch.randn(rows, weight.width).half()
        with using("dynamic_rows"):
            assert_close(linear(x, weight, None, "dynamic"), x, weight, None, "dynamic")


@pytest.mark.parametrize("spans", [2, 3, 7])
def test_spans_of_inputs_are_summed(spans: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some have no steps of their own."""
    monkeypatch.setattr(triton_launch, "_spans", lambda *_: spans)
    for scheme, how in ((Scheme(4, group_size=32, symmetric=False), "none"), (Scheme(), "dynamic")):
        weight = made(scheme)
        for dtype in LIMITS:
            x, bias = torch.randn(5, weight.width).to(dtype), torch.randn(37).to(dtype)
            with using("weight_only" if how == "none" else "dynamic_rows"):
                assert_close(linear(x, weight, bias, how), x, weight, bias, how)


@pytest.mark.parametrize("sizes", [(64, 32, 32), (128, 16, 64), (16, 64, 128)], ids=str)
def test_other_tiles(sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many rows, where codes are scaled before the product; of one group a step, or several."""
    chosen = [triton_configs.tile(*sizes, 4, 1)]
    monkeypatch.setattr(triton_weight_only.weight_only, "configs", chosen)
    monkeypatch.setattr(triton_dynamic.dynamic, "configs", chosen)
    for scheme in (
        Scheme(4, group_size=128, symmetric=False),
        Scheme(3, symmetric=False),
        Scheme(),
    ):
        weight = made(scheme)
        x, bias = torch.randn(40, weight.width), torch.randn(37)
        for path, how in (("weight_only", "none"), ("dynamic_rows", "dynamic")):
            with using(path):
                assert_close(linear(x, weight, bias, how), x, weight, bias, how)


@pytest.mark.parametrize("path", ["dynamic_rows", "by_int_mm"])
def test_integers_are_exact(path: str) -> None:
    """Codes and activations at their ends, where what saturates or rounds would show."""
    width = 256
    codes = torch.randint(-128, 128, (40, width), dtype=torch.int8)
    codes[:3] = torch.tensor([[127], [-128], [1]])
    weight = QuantizedWeight.from_codes(codes, torch.ones(40, 1), None, Scheme())
    x = torch.randint(-127, 128, (5, width)).float()
    x[0], x[:, 0] = 127, 127
    with using(path):
        assert torch.equal(linear(x, weight, None, "dynamic"), x @ codes.float().t())


def test_torch_int_mm_with_a_bias() -> None:
    weight = made(Scheme(), 40)
    for dtype in LIMITS:
        for rows in (1, 33):
            x, bias = torch.randn(rows, weight.width).to(dtype), torch.randn(40).to(dtype)
            with using("by_int_mm"):
                assert_close(linear(x, weight, bias, "dynamic"), x, weight, bias, "dynamic")


@pytest.mark.parametrize("stored", ["int", "fp8"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_rows_are_quantized_to_the_same_bits(stored: str, dtype: torch.dtype) -> None:
    x = torch.randn(7, 5000).to(dtype)
    x[1], x[2], x[3] = 0, x[2] * 1e-4, x[3] * 1e4
    x[4, :2] = torch.tensor([0.5, -1.5]) * x[4].abs().max() / 127  # halfway between codes
    wanted, scales = definition.quantized_rows(x, stored)
    found, found_scales = triton_launch.rows_quantized(x, stored)
    assert torch.equal(found.float(), wanted.float())
    assert torch.equal(found_scales, scales[:, 0])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_rows_that_are_not_finite_give_nothing_finite() -> None:
    weight, x = made(Scheme(), 40), torch.randn(4, 352)
    x[1, 3], x[2, 4] = torch.nan, -torch.inf
    for path in ("dynamic_rows", "by_int_mm"):
        with using(path):
            found = linear(x, weight, None, "dynamic")
        assert found[[0, 3]].isfinite().all() and not found[1:3].isfinite().any()


@pytest.mark.parametrize("scheme", SCHEMES + MORE, ids=name)
def test_numbers_and_rows_of_them_are_those_of_the_definition(scheme: Scheme) -> None:
    weight = made(scheme)
    indices = torch.tensor([[3, 0, 36], [36, 1, 3]])
    for dtype in (torch.float32, torch.float16):
        numbers = weight.dequantize(dtype)
        assert torch.equal(triton_launch.numbers(weight, dtype), numbers)
        for kind in (torch.int32, torch.int64):
            assert torch.equal(embedding(indices.to(kind), weight, dtype), numbers[indices])


def test_embedding_of_what_is_not_there() -> None:
    weight = made(Scheme(4))
    for index in (-1, 37):
        with pytest.raises(IndexError, match="37 rows"):
            embedding(torch.tensor([0, index]), weight)
    assert embedding(torch.zeros(2, 0).int(), weight).shape == (2, 0, 352)
    assert triton_launch.numbers(weight, torch.float32, torch.tensor([1, 37]))[1].isnan().all()


@pytest.mark.parametrize("pieces", [False, True])
def test_dequantized_and_gradients(pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pieces:
        monkeypatch.setattr(triton_numbers, "_PIECE", 10 * 192)
    weight = made(Scheme(4, group_size=64, symmetric=False))
    x, bias = torch.randn(2, 5, weight.width, requires_grad=True), torch.randn(37)
    with using("dequantized"):
        found = linear(x, weight, bias)
    numbers = weight.dequantize(torch.float64)
    assert off(found.detach(), x.detach().double() @ numbers.t() + bias) < 1e-6
    (slope,) = torch.autograd.grad(found.square().sum(), x)
    assert off(slope, 2 * found.detach().double() @ numbers) < 1e-6


def test_memory_in_any_order_and_no_rows() -> None:
    weight = made(Scheme(4, group_size=32))
    x = torch.randn(2 * weight.width, 12).t()[::2, ::2]
    assert x.stride(1) != 1
    for path, how in (("weight_only", "none"), ("dynamic_rows", "dynamic")):
        with using(path):
            assert_close(linear(x, weight, None, how), x, weight, None, how)
            assert linear(x[:0], weight, None, how).shape == (0, 37)
    q, scales = triton_launch.rows_quantized(x[:0], "int")
    assert q.shape == (0, weight.width) and scales.shape == (0,)


def test_stored_tensors_that_begin_anywhere() -> None:
    """Codes at an odd byte of a larger storage, as from a mapped file."""
    weight = made(Scheme(4, group_size=32))
    room = torch.zeros(weight.codes.numel() + 1, dtype=torch.uint8)
    room[1:] = weight.codes.flatten()
    scheme, codes = weight.scheme, room[1:].view(weight.codes.shape)
    x = torch.randn(3, weight.width)
    with using("weight_only"):
        fields = (scheme.bits, scheme.dtype, scheme.group_size, scheme.symmetric, "none")
        found = quantized_linear(x, codes, weight.scales, None, None, None, *fields)
    assert_close(found, x, weight, None, "none")


def test_large_offsets_do_not_change_the_result() -> None:
    """Codes are raised by 128 or 1024 and columns share a mean: what is taken off is far larger."""
    weight = made(Scheme(4, group_size=64))
    for dtype in (torch.float16, torch.bfloat16):
        x = (torch.randn(4, weight.width) + 8).to(dtype)
        x[:, 7] = 500
        with using("weight_only"):
            assert_close(linear(x, weight), x, weight, None, "none")


def test_paths_take_what_they_can_run() -> None:
    def names(scheme: Scheme, how: str, width: int, outputs: int = 64, **named: Any) -> set[str]:
        given = {"dtype": torch.bfloat16, **named}
        case = Case(scheme, "plain", how, given["dtype"], "cpu", outputs, width)
        return {p.name for p in paths.paths_for(case)} - {"definition", "dynamic", "int8pack"}

    weights = {"weight_only", "dequantized"}
    assert names(Scheme(4, group_size=32), "none", 96) == weights
    assert names(Scheme(4), "none", 97) == set()  # 49 bytes
    assert names(Scheme(4), "none", 95) == weights  # 48 bytes
    assert names(Scheme(4), "none", 90) == set()  # 45 bytes
    assert names(Scheme(4), "none", 96, dtype=torch.float64) == set()
    assert names(Scheme(), "dynamic", 96) == {"dynamic_rows", "by_int_mm"}
    assert names(Scheme(), "dynamic", 96, 63) == {"dynamic_rows"}
    assert names(Scheme(), "dynamic", 100) == {"dynamic_rows"}
    assert names(Scheme(8, symmetric=False), "dynamic", 96) == {"dynamic_rows"}
    assert names(Scheme(8, group_size=48), "dynamic", 96) == set()
    assert choice.chosen() == {}
