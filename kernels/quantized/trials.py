"""Paths for GPUs are tried before they are used: they run, and are right, on small random numbers.

Once in a process for each kind of weight, dtype and device, against the definition on the CPU. What
fails to compile, to run or to be right is left out, and a warning says so, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from math import gcd
from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.quantized import definition, static
from graphopt.kernels.quantized.cases import Case
from graphopt.kernels.quantized.rounding import quantize
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight

LIMITS = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}
"""Relative errors that a path may have, in the Frobenius norm: those of the dtype's rounding."""
STATIC = static.Static(0.0234375, 101)
"""By what static activations are quantized in a trial: numbers of a normal distribution saturate at
either end."""
_TF32 = 1e-3
_OUTPUTS = 80
Run = Callable[..., Any]


@cache
def is_right(name: str, run: Run, case: Case, device: torch.device) -> bool:
    """Whether ``run(name, x, weight, bias)`` is right on a device."""
    if not _has_triton():
        return False
    reason = failure(name, run, case, device)
    if reason is not None:
        warnings.warn(
            f"quantized products of {case.scheme} and {case.dtype} on {device} run without "
            f"{name!r}: {reason}",
            stacklevel=2,
        )
    return reason is None


@cache
def _has_triton() -> bool:
    found = find_spec("triton") is not None
    if not found:
        warnings.warn(
            "Triton is not installed: quantized products run by their definition, which is slow on "
            "a GPU (pip install triton)",
            stacklevel=2,
        )
    return found


def failure(name: str, run: Run, case: Case, device: torch.device) -> str | None:
    """Why it is not to be used, or None: few rows and many, of sizes that no tile divides."""
    width, most = trial_width(case.scheme), limit(case.dtype)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = _random_weight(case.scheme, width)
        there = _moved(weight, device)
        for rows in (3, 70):
            x, bias = _random(rows, width).to(case.dtype), _random(_OUTPUTS).to(case.dtype)
            wanted = wide_product(x, weight, bias, case.activations)
            extra = (STATIC,) if case.activations == "static" else ()
            try:
                found = run(name, x.to(device), there, bias.to(device), *extra).cpu()
            except Exception as error:  # whatever it is, something else runs instead
                return f"{type(error).__name__}: {error}"[:300]
            off = float((found.double() - wanted).norm() / wanted.norm())
            if not off <= most:
                return f"it is off by {off:.2g} for {rows} rows; {most:.2g} is rounding"
    return None


def trial_width(scheme: Scheme) -> int:
    """K of a trial: groups that make whole words, or a row that no tile divides."""
    size = scheme.group_size
    return 352 if size is None else 3 * size * 32 // gcd(size, 32)


def wide_product(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activations: str
) -> Tensor:
    """What the definition means, in float64, rows of x quantized in float32, or by `STATIC`."""
    added = 0.0 if bias is None else bias.double()
    if activations == "static":
        numbers = static.quantized(x, STATIC).sub_(STATIC.signed).double() * STATIC.scale
        return numbers @ weight.dequantize(torch.float64).t() + added
    if activations == "dynamic":
        return definition.dynamic(x.float(), weight, None).double() + added
    return x.double() @ weight.dequantize(torch.float64).t() + added


def limit(dtype: torch.dtype) -> float:
    """Products of float32 may be made in TF32, where torch is told so."""
    tensor_float = torch.get_float32_matmul_precision() != "highest"
    return _TF32 if dtype == torch.float32 and tensor_float else LIMITS[dtype]


def _random(*shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape))  # the caller's numbers are their own
    return torch.randn(*shape, generator=generator, device="cpu")


@cache
def _random_weight(scheme: Scheme, width: int) -> QuantizedWeight:
    return quantize(_random(_OUTPUTS, width), scheme)


def _moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    named = {name: tensor.to(device) for name, tensor in weight.tensors.items()}
    return QuantizedWeight(weight.scheme, weight.width, **named)
