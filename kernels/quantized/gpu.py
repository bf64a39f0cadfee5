"""Paths for GPUs: what they take, and that they are tried before they are used.

Kernels are Triton's, in `triton_launch`, which nothing imports before a call on a GPU. A path is
tried once in a process for each kind of weight, dtype and device, on small random numbers, against
the definition on the CPU. One that fails to compile, to run or to be right is left out, and a
warning says so.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from math import gcd
from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.quantized import definition
from graphopt.kernels.quantized.cases import Case
from graphopt.kernels.quantized.rounding import quantize
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight

_LIMITS = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}
"""Relative errors that a path may have, in the Frobenius norm: those of the dtype's rounding."""
_TF32 = 1e-3
_FLOAT8 = (8, 9)
"""Compute capability from which a GPU has E4M3 numbers."""


def interpreted() -> bool:
    """Whether Triton interprets its kernels, anywhere, as tests have it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def run(name: str, *given: Any) -> Any:
    """Call a function of `triton_launch`."""
    from graphopt.kernels.quantized import triton_launch

    return getattr(triton_launch, name)(*given)


def embedding(indices: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of the weight; on a GPU, an index that is not there surfaces as torch's own do there."""
    flat, outputs = indices.flatten(), weight.shape[0]
    exist = ((flat >= 0) & (flat < outputs)).all()
    if flat.is_cuda:
        torch._assert_async(exist, f"an index is not of the {outputs} rows of the embedding")
    elif not exist:
        raise IndexError(f"an index is not of the {outputs} rows of the embedding")
    made: Tensor = run("numbers", weight, dtype, flat)
    return made.view(*indices.shape, weight.width)


def takes(name: str, case: Case) -> bool:
    """Whether a function of `triton_launch` can run a case here, and was right when tried."""
    if not (case.device == "cuda" or interpreted()) or not _FITS[name](case):
        return False
    if case.device != "cuda":
        return name != "by_scaled_mm"
    device = torch.device("cuda", torch.cuda.current_device())
    needs_float8 = case.scheme.dtype in ("fp8", "nvfp4")
    if needs_float8 and torch.cuda.get_device_capability(device) < _FLOAT8:
        return False
    return _tried(name, case.scheme, case.activations, case.dtype, device)


def _fits(case: Case, activations: str) -> bool:
    """Rows of codes are words of 32 bits."""
    words = case.scheme.row_codes(case.inputs) % 4 == 0
    return case.activations == activations and case.dtype in _LIMITS and words


def _reads(case: Case) -> bool:
    return _fits(case, "none")


def _multiplies(case: Case) -> bool:
    """Steps of 32 lie in one group."""
    return _fits(case, "dynamic") and (case.scheme.group_size or 0) % 32 == 0


def _torch_multiplies(case: Case) -> bool:
    even = case.inputs % 8 == 0 and case.outputs % 8 == 0
    return _fits(case, "dynamic") and case.scheme == Scheme(8) and even


def _torch_scales(case: Case) -> bool:
    fits = case.scheme == Scheme(8, "fp8") and case.dtype == torch.bfloat16
    return _fits(case, "dynamic") and fits and case.inputs % 16 == 0 and case.outputs % 16 == 0


_FITS: dict[str, Callable[[Case], bool]] = {
    "weight_only": _reads,
    "dequantized": _reads,
    "dynamic_rows": _multiplies,
    "by_int_mm": _torch_multiplies,
    "by_scaled_mm": _torch_scales,
}
NAMES = tuple(_FITS)


@cache
def _tried(
    name: str, scheme: Scheme, activations: str, dtype: torch.dtype, device: torch.device
) -> bool:
    reason = _no_triton(device) or _failure(name, scheme, activations, dtype, device)
    if reason is not None:
        warnings.warn(
            f"graphopt runs products of {scheme} and {dtype} on {device} without its path {name!r}: "
            f"{reason}",
            stacklevel=2,
        )
    return reason is None


@cache
def _no_triton(device: torch.device) -> str | None:  # noqa: ARG001 - said once for each
    return None if find_spec("triton") else "Triton is not installed (pip install triton)"


def _failure(
    name: str, scheme: Scheme, activations: str, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a function is not to be used, or None: two sizes with odd ends, few rows and many."""
    width = trial_width(scheme)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = _random_weight(scheme, 80, width)
        there = _moved(weight, device)
        for rows in (3, 70):
            x, bias = _random(rows, width).to(dtype), _random(80).to(dtype)
            wanted = wide_product(x, weight, bias, activations)
            try:
                found = run(name, x.to(device), there, bias.to(device)).cpu()
            except Exception as error:  # whatever it is, the definition runs instead
                return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            off = float((found.double() - wanted).norm() / wanted.norm())
            if not off <= limit(dtype):
                return f"it is off by {off:.2g}, more than {limit(dtype):.2g}"
    return None


def trial_width(scheme: Scheme) -> int:
    """K of a trial: groups that make whole words, or a row that no tile divides."""
    size = scheme.group_size
    return 352 if size is None else 3 * size * 32 // gcd(size, 32)


def wide_product(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activations: str
) -> Tensor:
    """What the definition means, float64: activations are quantized in float32."""
    added = 0.0 if bias is None else bias.double()
    if activations == "none":
        return x.double() @ weight.dequantize(torch.float64).t() + added
    return definition.dynamic(x.float(), weight, None).double() + added


def limit(dtype: torch.dtype) -> float:
    tensor_float = torch.get_float32_matmul_precision() != "highest"
    return _TF32 if dtype == torch.float32 and tensor_float else _LIMITS[dtype]


def _random(*shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape))  # the caller's numbers are their own
    return torch.randn(*shape, generator=generator, device="cpu")


@cache
def _random_weight(scheme: Scheme, outputs: int, width: int) -> QuantizedWeight:
    return quantize(_random(outputs, width), scheme)


def _moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    named = {name: tensor.to(device) for name, tensor in weight.tensors.items()}
    return QuantizedWeight(weight.scheme, weight.width, **named)
