"""Scales as they are stored, and as the numbers they stand for.

Scales of output channels are float32: they are few. Those of groups, and zero points with them, are
float16 where every scale is a normal number of it, which costs an error of 2**-11 of a scale that
codes are then chosen for; weights beyond its range have float32. MXFP4 stores the exponent plus 127
of a power of two as uint8, and NVFP4 an E4M3 number, which times one float32 of the whole tensor is
the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.kernels.quantized.scheme import Scheme

_HALF = torch.finfo(torch.float16)
_E4M3_SMALLEST, _E4M3_LARGEST = 2.0**-9, 448.0


def tensor_scale(weight: Tensor, scheme: Scheme) -> Tensor | None:
    """The float32 that scales of NVFP4 are relative to: the largest of them becomes 448."""
    if scheme.dtype != "nvfp4":
        return None
    low, high = weight.aminmax() if weight.numel() else (weight.new_zeros(()),) * 2
    most = torch.maximum(high, -low).to(torch.float32)
    return torch.where(most > 0, most / (6 * _E4M3_LARGEST), 1.0)


def storable(scales: Tensor, scheme: Scheme, outer: Tensor | None) -> Tensor:
    """The nearest scales, float32, that the format stores; float ones are as they are.

    ``outer`` is `tensor_scale`. A power of two is the one below, as section 6.3 of the OCP MX
    specification has it.
    """
    if scheme.dtype == "mxfp4":
        return torch.exp2(_exponent(scales).to(torch.float32))
    if scheme.dtype == "nvfp4":
        return _e4m3(scales, outer).to(torch.float32) * outer
    return scales


def kept(numbers: Tensor, scheme: Scheme) -> Tensor:
    """Scales or zeros, float32, as `store` will round them where all of them fit."""
    if scheme.group_size is None or scheme.dtype in ("mxfp4", "nvfp4"):
        return numbers
    size = numbers.abs()
    return torch.where((size >= _HALF.tiny) & (size <= _HALF.max), numbers.half().float(), numbers)


def store(scales: Tensor, scheme: Scheme, outer: Tensor | None) -> Tensor:
    """Float32 scales ``(N, G)`` in the dtype that they are kept in."""
    if scheme.dtype == "mxfp4":
        return (_exponent(scales) + 127).to(torch.uint8)
    if scheme.dtype == "nvfp4":
        return _e4m3(scales, outer)
    if scheme.group_size is None or not scales.numel():
        return scales
    low, high = scales.abs().aminmax()
    fits = bool((low >= _HALF.tiny) & (high <= _HALF.max))
    return scales.to(torch.float16) if fits else scales


def load(stored: Tensor, scheme: Scheme, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Scales as numbers; ``dtype`` is float32 or float64, which hold all of them exactly."""
    if scheme.dtype == "mxfp4":
        return torch.exp2(stored.to(dtype) - 127)
    scales = stored.to(dtype)
    return scales if outer is None else (scales * outer).to(dtype)


def _exponent(scales: Tensor) -> Tensor:
    """``floor(log2(scale))``, of float32, without the rounding of a logarithm."""
    return (torch.frexp(scales).exponent - 1).clamp(-127, 127)


def _e4m3(scales: Tensor, outer: Tensor | None) -> Tensor:
    assert outer is not None  # of NVFP4
    return (scales / outer).clamp(_E4M3_SMALLEST, _E4M3_LARGEST).to(torch.float8_e4m3fn)
