"""Products of int8 in plain operators: the numbers and gradients of the operator."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.kernels.quantized.autograd import linear
from graphopt.kernels.quantized.rounding import quantize
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.spelled import int8_linear, static_linear
from graphopt.kernels.quantized.static import Static

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")

OUTPUTS = 40
Run = Callable[[Tensor], Tensor]


def _both(width: int = 48, bias: bool = True, static: Static | None = None) -> tuple[Run, Run]:
    """The operator and its spelling, behind an activation."""
    torch.manual_seed(0)
    weight = quantize(torch.randn(OUTPUTS, width), Scheme(8))
    added = torch.randn(OUTPUTS) if bias else None

    def operator(x: Tensor) -> Tensor:
        if static is not None:
            given = None if added is None else added.to(x.dtype)
            return linear(F.relu(x), weight, given, "static", static)
        return linear(F.relu(x), weight, None if added is None else added.to(x.dtype), "dynamic")

    def spelling(x: Tensor) -> Tensor:
        given = None if added is None else added.to(x.dtype)
        if static is not None:
            return static_linear(F.relu(x), weight.codes, weight.scales, given, *static)
        return int8_linear(F.relu(x), weight.codes, weight.scales, given)

    return operator, spelling


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "bias"), [((5, 48), True), ((2, 3, 48), False), ((1, 7), True)])
@pytest.mark.parametrize(
    ("compiled", "static"),
    [(False, None), (True, None), (False, Static(0.015625, 3)), (True, Static(0.03125, 128))],
    ids=str,
)
def test_it_computes_the_same(
    dtype: torch.dtype, shape: tuple[int, ...], bias: bool, compiled: bool, static: Static | None
) -> None:
    operator, spelling = _both(shape[-1], bias, static)
    x = torch.randn(shape).to(dtype)
    torch._dynamo.reset()
    made = (torch.compile(spelling, fullgraph=True) if compiled else spelling)(x)
    wanted = operator(x)
    assert made.dtype == dtype and made.shape == wanted.shape
    close = 8e-3 if dtype == torch.bfloat16 else 1e-6
    assert (made - wanted).double().norm() <= close * wanted.double().norm()


@pytest.mark.parametrize("static", [None, Static(0.015625, 3)])
def test_rows_may_be_of_any_number_zero_or_not_finite(static: Static | None) -> None:
    operator, spelling = _both(static=static)
    compiled = torch.compile(spelling, fullgraph=True, dynamic=True)
    for rows in (4, 9):
        x = torch.randn(rows, 48)
        x[0] = 0
        torch.testing.assert_close(compiled(x), operator(x), rtol=1e-5, atol=1e-5)
        x[1, 5] = float("nan")
        assert compiled(x)[1].isnan().all() and compiled(x)[2].isfinite().all()


@pytest.mark.parametrize("static", [None, Static(0.015625, 3)])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_operator(compiled: bool, static: Static | None) -> None:
    operator, spelling = _both(static=static)
    if compiled:
        spelling = torch.compile(spelling, fullgraph=True)
    x, gradients = torch.randn(6, 48), []
    for run in (operator, spelling):
        leaf = x.clone().requires_grad_()
        run(leaf).cos().sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None and gradients[0].abs().sum() > 1
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
