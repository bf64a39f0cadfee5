"""Paths for GPUs: what they take where; see `trials` for what must be right before it is used.

Kernels are Triton's, in `triton_launch`, which nothing imports before a call on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.quantized.cases import Case
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.trials import LIMITS, is_right
from graphopt.kernels.quantized.weight import QuantizedWeight

_FLOAT8 = (8, 9)
"""Compute capability from which a GPU has E4M3 numbers."""


def interpreted() -> bool:
    """Whether Triton interprets its kernels, anywhere, as tests have it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """The GPU of a tensor as the current one."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


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
    return is_right(name, run, case._replace(outputs=0, inputs=0), device)


def _fits(case: Case, activations: str) -> bool:
    """Rows of codes are words of 32 bits."""
    words = case.scheme.row_codes(case.inputs) % 4 == 0
    return case.activations == activations and case.dtype in LIMITS and words


def _reads(case: Case) -> bool:
    return _fits(case, "none")


def _multiplies(case: Case) -> bool:
    """Steps of 32 lie in one group."""
    return _fits(case, "dynamic") and (case.scheme.group_size or 0) % 32 == 0


def _multiplies_static(case: Case) -> bool:
    return _fits(case, "static") and (case.scheme.group_size or 0) % 32 == 0


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
    "static_rows": _multiplies_static,
    "by_int_mm": _torch_multiplies,
    "by_scaled_mm": _torch_scales,
}
NAMES = tuple(_FITS)
