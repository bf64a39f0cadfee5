"""What the operators compute, in plain PyTorch, on any device.

Weight-only: ``y = x @ W.T + bias`` with W the dequantized weight, rounded to the dtype of x.

Dynamic activations: for each row, ``a = max|x| / 127`` and ``q = round(x / a)``, int8; then
``y = a * sum_g scale_g * (q_g @ (codes_g - zero_g).T) + bias`` over the groups g of K, where
products of codes are exact in int32 and the rest is float32. (Per-token quantization: Yao et al.
2022, "ZeroQuant", section 4.1.) For ``fp8``, q are E4M3 numbers, ``a = max|x| / 448``, and products
are summed in float32. Rows that hold NaN or infinity give NaN. Where x is float64, so is the rest.

Weights are read a few output channels at a time, so that none is dequantized whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.kernels.quantized import integers
from graphopt.kernels.quantized.packing import row_chunks
from graphopt.kernels.quantized.weight import QuantizedWeight

_PIECE = 1 << 21
"""Numbers of a weight, or of a result, that are held at once beyond those given."""


def weight_only(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """``x (M, K)`` to ``(M, N)`` in the dtype of x."""
    made = x.new_empty((x.shape[0], weight.shape[0]))
    bias = None if bias is None else bias.to(x.dtype)
    for rows in row_chunks(*weight.shape, _PIECE):
        part = weight.select(rows).dequantize(x.dtype)
        made[:, rows] = F.linear(x, part, None if bias is None else bias[rows])
    return made


def input_gradient(grad: Tensor, weight: QuantizedWeight) -> Tensor:
    """``grad (M, N) @ W``, ``(M, K)``, summed in float32 or float64."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    made = grad.new_zeros((grad.shape[0], weight.width), dtype=wide)
    for rows in row_chunks(*weight.shape, _PIECE):
        made += grad[:, rows] @ weight.select(rows).dequantize(grad.dtype)
    return made.to(grad.dtype)


def embedding(indices: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of the weight: ``(*indices.shape, K)``."""
    chosen = weight.select(indices.flatten()).dequantize(dtype)
    return chosen.view(*indices.shape, weight.width)


def dynamic(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """``x (M, K)`` to ``(M, N)`` in the dtype of x, activations quantized row by row."""
    made = x.new_empty((x.shape[0], weight.shape[0]))
    wide = torch.promote_types(x.dtype, torch.float32)
    q, scale = quantized_rows(x, weight.scheme.dtype)
    multiply = _float8_products if weight.scheme.dtype == "fp8" else _integer_products
    for rows in row_chunks(weight.shape[0], max(x.shape[0], weight.width), _PIECE):
        part = multiply(q, weight.select(rows), wide).mul_(scale)
        made[:, rows] = part if bias is None else part.add_(bias[rows])
    return made


def quantized_rows(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Codes of ``x (M, K)``, int8 or float8_e4m3fn, and scales ``(M, 1)``, float32 or float64."""
    top = 448 if dtype == "fp8" else 127
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    most = wide.abs().amax(-1, keepdim=True)
    scale = (most / top).clamp_(min=torch.finfo(torch.float32).tiny)
    scaled = wide / scale
    scale = torch.where(most.isfinite(), scale, torch.nan)
    if dtype == "fp8":
        return scaled.clamp_(-448, 448).to(torch.float8_e4m3fn), scale
    return scaled.round_().clamp_(-127, 127).to(torch.int8), scale


def _integer_products(q: Tensor, weight: QuantizedWeight, wide: torch.dtype) -> Tensor:
    """``sum_g scale_g * (q_g @ (codes_g - zero_g).T)``, ``(M, N)``."""
    made: Tensor | None = None
    codes = weight.unpacked()
    for group, columns in enumerate(_groups(weight)):
        left = q[:, columns]
        part = integers.product(left, codes[:, columns]).to(wide)
        if weight.zeros is not None:
            total = left.sum(-1, keepdim=True, dtype=torch.int32).to(wide)
            part.sub_(total * weight.zeros[:, group].to(wide))
        part.mul_(weight.scales[:, group].to(wide))
        made = part if made is None else made.add_(part)
    assert made is not None  # a weight has a group
    return made


def _groups(weight: QuantizedWeight) -> Iterator[slice]:
    size = weight.width // weight.scales.shape[1]
    return (slice(start, start + size) for start in range(0, weight.width, size))


def _float8_products(q: Tensor, weight: QuantizedWeight, wide: torch.dtype) -> Tensor:
    return (q.to(wide) @ weight.codes.to(wide).t()).mul_(weight.scales[:, 0].to(wide))
