"""What the operators compute, in plain PyTorch, on any device.

Weight-only: ``y = x @ W.T + bias`` with W the dequantized weight, rounded to the dtype of x.

Dynamic activations: for each row, ``a = max|x| / 127`` and ``q = round(x / a)``, int8; then
``y = a * sum_g scale_g * (q_g @ (codes_g - zero_g).T) + bias`` over the groups g of K, where
products of codes are exact in int32 and the rest is float32. (Per-token quantization: Yao et al.
2022, "ZeroQuant", section 4.1.) For ``fp8``, q are E4M3 numbers, ``a = max|x| / 448``, and products
are summed in float32. Rows that hold NaN or infinity give no finite number. Where x is float64, so
is the rest.

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
"""Numbers of a weight that are held at once, dequantized."""
HELD = 1 << 24
"""Numbers of a result that are held at once as integers: in smaller pieces the product is slower,
which costs more than rescaling them in cache saves (1.6 times the whole for K = 1536, N = 384)."""


def weight_only(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """``x (M, K)`` to ``(M, N)`` in the dtype of x."""
    made = x.new_empty((x.shape[0], weight.shape[0]))
    bias = None if bias is None else bias.to(x.dtype)
    for rows, part in pieces(weight, weight.width, _PIECE):
        numbers = part.dequantize(x.dtype)
        made[:, rows] = F.linear(x, numbers, None if bias is None else bias[rows])
    return made


def input_gradient(grad: Tensor, weight: QuantizedWeight) -> Tensor:
    """``grad (M, N) @ W``, ``(M, K)``, summed in float32 or float64."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    made = grad.new_zeros((grad.shape[0], weight.width), dtype=wide)
    for rows, part in pieces(weight, weight.width, _PIECE):
        made += grad[:, rows] @ part.dequantize(grad.dtype)
    return made.to(grad.dtype)


def embedding(indices: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of the weight: ``(*indices.shape, K)``."""
    chosen = weight.select(indices.flatten()).dequantize(dtype)
    return chosen.view(*indices.shape, weight.width)


def pieces(
    weight: QuantizedWeight, width: int, numbers: int
) -> Iterator[tuple[slice, QuantizedWeight]]:
    """Some output channels at a time, of ``width`` numbers each."""
    for rows in row_chunks(weight.shape[0], width, numbers):
        whole = rows.stop - rows.start == weight.shape[0]
        yield rows, weight if whole else weight.select(rows)


def dynamic(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """``x (M, K)`` to ``(M, N)`` in the dtype of x, activations quantized row by row."""
    made = x.new_empty((x.shape[0], weight.shape[0]))
    q, scale = quantized_rows(x, weight.scheme.dtype)
    bias = None if bias is None else bias.to(scale.dtype)
    multiply = _float8_products if weight.scheme.dtype == "fp8" else integer_products
    held = max(len(x), 0 if weight.codes.dtype == torch.int8 else weight.width, 1)
    for rows, piece in pieces(weight, held, HELD):
        part = multiply(q, piece, scale.dtype)
        if bias is None:
            torch.mul(part, scale, out=made[:, rows])
        else:
            torch.addcmul(bias[rows], part, scale, out=made[:, rows])
    return made


def quantized_rows(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Codes of ``x (M, K)``, int8 or float8_e4m3fn, and scales ``(M, 1)``, float32 or float64."""
    top = 448 if dtype == "fp8" else 127
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    most = wide.abs().amax(-1, keepdim=True)
    scale = most.div_(top).clamp_(min=torch.finfo(torch.float32).tiny)
    scaled = wide / scale
    if dtype == "fp8":
        return scaled.clamp_(-448, 448).to(torch.float8_e4m3fn), scale
    return scaled.round_().to(torch.int8), scale


def integer_products(q: Tensor, weight: QuantizedWeight, wide: torch.dtype) -> Tensor:
    """``sum_g scale_g * (q_g @ (codes_g - zero_g).T)``, ``(M, N)``."""
    codes, scales = weight.unpacked(), weight.scales.to(wide)
    zeros = None if weight.zeros is None else weight.zeros.to(wide)
    made: Tensor | None = None
    for group, columns in enumerate(_groups(weight)):
        left = q[:, columns]
        part = integers.product(left, codes[:, columns])
        if zeros is not None:
            total = left.sum(-1, keepdim=True, dtype=torch.int32)
            part = part.to(wide).addcmul_(total.to(wide), zeros[:, group], value=-1)
        scaled = part.to(wide).mul_(scales[:, group])  # of mixed dtypes it would take twice as long
        made = scaled if made is None else made.add_(scaled)
    assert made is not None  # a weight has a group
    return made


def _groups(weight: QuantizedWeight) -> Iterator[slice]:
    size = weight.width // weight.scales.shape[1]
    return (slice(start, start + size) for start in range(0, weight.width, size))


def _float8_products(q: Tensor, weight: QuantizedWeight, wide: torch.dtype) -> Tensor:
    return (q.to(wide) @ weight.codes.to(wide).t()).mul_(weight.scales[:, 0].to(wide))
