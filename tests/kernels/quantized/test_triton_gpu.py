"""The Triton kernels of quantized products, and torch's own beside them, on a real device."""

from __future__ import annotations

import warnings

import pytest
import torch
from quantized_cases import SCHEMES, name
from torch import Tensor

from graphopt.kernels.quantized import (
    QuantizedWeight,
    Scheme,
    chosen,
    embedding,
    linear,
    quantize,
    using,
)
from graphopt.kernels.quantized.trials import LIMITS, wide_product

pytestmark = pytest.mark.gpu
MORE = [
    Scheme(4, group_size=64, symmetric=False),
    Scheme(4, group_size=128),
    Scheme(3, group_size=64),
]
DYNAMIC = [s for s in SCHEMES + MORE if s.dtype in ("int", "fp8") and (s.group_size or 0) % 32 == 0]
ROWS = [1, 16, 17, 64, 200]


@pytest.fixture(autouse=True)
def no_path_is_left_out() -> None:
    warnings.filterwarnings("error", message="quantized products")


def made(scheme: Scheme, outputs: int = 1000, width: int = 1536) -> QuantizedWeight:
    return quantize(torch.randn(outputs, width), scheme)


def moved(weight: QuantizedWeight) -> QuantizedWeight:
    named = {name: tensor.cuda() for name, tensor in weight.tensors.items()}
    return QuantizedWeight(weight.scheme, weight.width, **named)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().cpu().double() - wanted).norm() / wanted.norm())


def needs_float8(scheme: Scheme) -> None:
    if scheme.dtype in ("fp8", "nvfp4") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with E4M3 numbers")


@pytest.mark.parametrize("scheme", SCHEMES + MORE, ids=name)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("path", ["weight_only", "dequantized"])
def test_weight_only(path: str, scheme: Scheme, dtype: torch.dtype) -> None:
    needs_float8(scheme)
    weight, bias = made(scheme), torch.randn(1000).to(dtype)
    there = moved(weight)
    for rows in ROWS:
        x = torch.randn(rows, 1536).to(dtype)
        with using(path):
            found = linear(x.cuda(), there, bias.cuda())
        assert off(found, wide_product(x, weight, bias, "none")) < LIMITS[dtype]


@pytest.mark.parametrize("scheme", DYNAMIC, ids=name)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_dynamic(scheme: Scheme, dtype: torch.dtype) -> None:
    needs_float8(scheme)
    weight, bias = made(scheme), torch.randn(1000).to(dtype)
    there = moved(weight)
    for rows in ROWS:
        x = torch.randn(rows, 1536).to(dtype)
        with using("dynamic_rows"):
            found = linear(x.cuda(), there, bias.cuda(), "dynamic")
        assert off(found, wide_product(x, weight, bias, "dynamic")) < LIMITS[dtype]


@pytest.mark.parametrize(
    ("path", "scheme"), [("by_int_mm", Scheme()), ("by_scaled_mm", Scheme(8, "fp8"))]
)
def test_products_of_torch(path: str, scheme: Scheme) -> None:
    needs_float8(scheme)
    weight, bias = made(scheme, 1024), torch.randn(1024).bfloat16()
    for rows in ROWS:
        x = torch.randn(rows, 1536).bfloat16()
        with using(path):
            found = linear(x.cuda(), moved(weight), bias.cuda(), "dynamic")
        assert off(found, wide_product(x, weight, bias, "dynamic")) < LIMITS[torch.bfloat16]


def test_integers_are_exact() -> None:
    codes = torch.randint(-128, 128, (512, 1024), dtype=torch.int8)
    weight = QuantizedWeight.from_codes(codes, torch.ones(512, 1), None, Scheme())
    x = torch.randint(-127, 128, (100, 1024)).float()
    x[0], x[:, 0] = 127, 127
    for path in ("dynamic_rows", "by_int_mm"):
        with using(path):
            found = linear(x.cuda(), moved(weight), None, "dynamic").cpu()
        assert torch.equal(found.double(), x.double() @ codes.double().t())


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_rows_and_gradients(scheme: Scheme) -> None:
    needs_float8(scheme)
    weight = made(scheme)
    there, indices = moved(weight), torch.tensor([[3, 0, 999], [999, 1, 3]])
    for dtype in (torch.float32, torch.bfloat16):
        found = embedding(indices.cuda(), there, dtype)
        assert torch.equal(found.cpu(), weight.dequantize(dtype)[indices])
    x = torch.randn(5, 1536, device="cuda", requires_grad=True)
    (slope,) = torch.autograd.grad(linear(x, there).sum(), x)
    assert off(slope, weight.dequantize(torch.float64).sum(0).expand(5, 1536)) < 1e-5


def test_the_same_bits_every_time() -> None:
    weight, x = moved(made(Scheme(4, group_size=64), 512, 8192)), torch.randn(3, 8192).half().cuda()
    with using("weight_only"):
        assert torch.equal(linear(x, weight), linear(x, weight))


def test_a_cuda_graph_replays_what_was_chosen() -> None:
    weight, x = made(Scheme(4, group_size=64)), torch.randn(4, 1536).bfloat16()
    there, given = moved(weight), x.cuda()
    linear(given, there)
    assert any(case.device == "cuda" for case, _, _ in chosen())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made_there = linear(given, there)
    given.copy_(2 * given)
    graph.replay()
    assert off(made_there, wide_product(2 * x, weight, None, "none")) < LIMITS[torch.bfloat16]
