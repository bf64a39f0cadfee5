"""The operators against what they are defined as, in float64 and in integers."""

from __future__ import annotations

import pytest
import torch
from quantized_cases import SCHEMES, WIDTH, name
from torch import Tensor

from graphopt.kernels.quantized import (
    QuantizedWeight,
    Scheme,
    embedding,
    integers,
    linear,
    quantize,
    using,
)
from graphopt.kernels.quantized.definition import quantized_rows

DTYPES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DYNAMIC = [scheme for scheme in SCHEMES if scheme.dtype in ("int", "fp8")]
OUTPUTS = 40


def made(scheme: Scheme, outputs: int = OUTPUTS, width: int = WIDTH) -> QuantizedWeight:
    return quantize(torch.randn(outputs, width), scheme)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def by_integers(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Dynamic activations: products summed as int64, all else in float64."""
    x = x.to(torch.float32)
    scale = x.abs().amax(-1, keepdim=True) / 127
    q = (x / scale).round().to(torch.int64)
    size = weight.width // weight.scales.shape[1]
    codes = weight.unpacked().to(torch.int64)
    y = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=torch.float64)
    for group in range(weight.scales.shape[1]):
        part = slice(group * size, (group + 1) * size)
        total = (q[..., part] @ codes[:, part].t()).double()
        if weight.zeros is not None:
            total -= q[..., part].sum(-1, keepdim=True) * weight.zeros[:, group].double()
        y += total * weight.scales[:, group].double()
    return y * scale.double()


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_only_is_the_product_with_the_numbers(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = made(scheme)
    x, bias = torch.randn(3, 5, WIDTH).to(dtype), torch.randn(OUTPUTS).to(dtype)
    found = linear(x, weight, bias)
    wanted = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
    assert found.dtype == dtype and found.shape == (3, 5, OUTPUTS)
    assert off(found, wanted) < DTYPES[dtype]
    assert off(linear(x, weight), wanted - bias.double()) < DTYPES[dtype]


@pytest.mark.parametrize("scheme", [s for s in DYNAMIC if s.dtype == "int"], ids=name)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
def test_dynamic_is_exact_in_integers(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = made(scheme)
    x, bias = torch.randn(3, 5, WIDTH).to(dtype), torch.randn(OUTPUTS).to(dtype)
    found = linear(x, weight, bias, "dynamic")
    wanted = by_integers(x, weight) + bias.double()
    assert found.dtype == dtype
    assert off(found, wanted) < min(DTYPES[dtype], 4e-3)
    dense = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
    assert off(found, dense) < 0.012


def test_dynamic_float8() -> None:
    weight = made(Scheme(8, "fp8"))
    x = torch.randn(6, WIDTH)
    scale = x.abs().amax(-1, keepdim=True) / 448
    rounded = (x / scale).to(torch.float8_e4m3fn).double() * scale.double()
    wanted = rounded @ weight.dequantize(torch.float64).t()
    assert off(linear(x, weight, None, "dynamic"), wanted) < 1e-6
    assert 0.01 < off(linear(x, weight, None, "dynamic"), linear(x, weight).double()) < 0.04


def test_dynamic_beyond_float32_integers() -> None:
    """All sums are near 2**30 and odd, where float32 has only every 64th number."""
    width = 65536
    codes = torch.full((3, width), 127, dtype=torch.int8)
    codes[:, 0] = torch.tensor([1, 3, 5])
    weight = QuantizedWeight.from_codes(codes, torch.ones(3, 1), None, Scheme())
    x = torch.full((2, width), 127.0, dtype=torch.float64)
    wanted = x.long() @ codes.long().t()
    assert torch.equal(linear(x, weight, None, "dynamic").long(), wanted)


def test_sums_that_do_not_fit_are_refused() -> None:
    assert integers.LONGEST * 127 * 128 < 2**31 <= (integers.LONGEST + 1) * 127 * 128
    width = integers.LONGEST + 1
    weight = quantize(torch.ones(1, width), Scheme())
    with pytest.raises(ValueError, match="activations='none' has no such bound"):
        linear(torch.ones(1, width), weight, None, "dynamic")
    assert linear(torch.ones(1, width), weight).shape == (1, 1)


@pytest.mark.parametrize("activations", ["none", "dynamic"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 1, 3, 2)])
def test_any_leading_dimensions(activations: str, shape: tuple[int, ...]) -> None:
    weight = made(Scheme(4, group_size=32, symmetric=False))
    x, bias = torch.randn(*shape, WIDTH), torch.randn(OUTPUTS)
    found = linear(x, weight, bias, activations)
    assert found.shape == (*shape, OUTPUTS)
    flat = linear(x.reshape(-1, WIDTH), weight, bias, activations)
    assert torch.equal(found.reshape(-1, OUTPUTS), flat)


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_memory_in_any_order(activations: str) -> None:
    weight = made(Scheme())
    x = torch.randn(WIDTH, 6, 4).transpose(0, 2)[:, ::2]
    assert not x.is_contiguous()
    found = linear(x, weight, None, activations)
    assert torch.allclose(found, linear(x.contiguous(), weight, None, activations), atol=1e-6)


@pytest.mark.parametrize("width", [1, 5, 7, 33])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_odd_widths(bits: int, width: int) -> None:
    for symmetric in (True, False):
        weight = made(Scheme(bits, symmetric=symmetric), 3, width)
        x = torch.randn(4, width)
        wanted = x.double() @ weight.dequantize(torch.float64).t()
        assert torch.allclose(linear(x, weight).double(), wanted, atol=1e-5)
        exact = by_integers(x, weight)
        assert torch.allclose(linear(x, weight, None, "dynamic").double(), exact, atol=1e-4)


def test_pieces_of_a_weight_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(7, WIDTH), made(Scheme(4, group_size=32)), torch.randn(OUTPUTS)
    whole = [linear(x, weight, bias, activations) for activations in ("none", "dynamic")]
    x.requires_grad_()
    (slope,) = torch.autograd.grad(linear(x, weight).square().sum(), x)
    monkeypatch.setattr("graphopt.kernels.quantized.definition._PIECE", 7 * WIDTH)
    monkeypatch.setattr("graphopt.kernels.quantized.definition.HELD", 3 * WIDTH)
    for activations, wanted in zip(("none", "dynamic"), whole, strict=True):
        assert torch.allclose(linear(x, weight, bias, activations), wanted, atol=1e-5)
    (cut,) = torch.autograd.grad(linear(x, weight).square().sum(), x)
    assert torch.allclose(cut, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_of_zeros_are_zeros(dtype: torch.dtype) -> None:
    for stored in ("int", "fp8"):
        q, scale = quantized_rows(torch.zeros(2, WIDTH, dtype=dtype), stored)
        assert (q.float() == 0).all() and (scale > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_that_are_zero_tiny_or_not_finite(dtype: torch.dtype) -> None:
    weight = made(Scheme())
    x = torch.randn(5, WIDTH).to(dtype)
    x[0] = 0
    x[1, 3], x[2, 4], x[3] = torch.nan, -torch.inf, x[3] * torch.finfo(dtype).smallest_normal
    found = linear(x, weight, None, "dynamic")
    assert (found[0] == 0).all() and not found[1:3].isfinite().any()
    assert found[3].isfinite().all() and found[4].isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_reads_rows(scheme: Scheme, dtype: torch.dtype) -> None:
    weight = made(scheme)
    for indices in (torch.tensor([[3, 0], [39, 3]]), torch.tensor(7), torch.zeros(2, 0).int()):
        found = embedding(indices, weight, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, weight.dequantize(dtype)[indices])


def test_embedding_refuses_rows_that_are_not_there() -> None:
    weight = made(Scheme(4))
    for index in (-1, OUTPUTS):
        with pytest.raises(IndexError):
            embedding(torch.tensor([index]), weight)
    with pytest.raises(TypeError, match="int32 or int64"):
        embedding(torch.tensor([1.0]), weight)


def test_a_tied_head_reads_the_same_storage() -> None:
    weight = made(Scheme(4, group_size=32))
    rows = embedding(torch.arange(OUTPUTS), weight)
    logits = linear(rows, weight)
    assert torch.allclose(logits, weight.dequantize() @ weight.dequantize().t(), atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    weight, x = made(Scheme(4, "nf4", 32)), torch.randn(2, WIDTH)
    with pytest.raises(ValueError, match="dtype int and fp8 have"):
        linear(x, weight, None, "dynamic")
    with pytest.raises(ValueError, match="not one of none, dynamic, static"):
        linear(x, weight, None, "fixed")
    with pytest.raises(ValueError, match="codes are"):
        linear(x[:, :64], weight)
    with pytest.raises(ValueError, match="40 output channels"):
        linear(x, weight, torch.ones(1))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        linear(x.long(), weight)
    with pytest.raises(ValueError, match="no path is called"), using("magic"):
        pass
