"""Numbers of a weight on a GPU: whole, in pieces for a product by torch, and some rows of them."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.kernels.quantized import tables
from graphopt.kernels.quantized.gpu import on
from graphopt.kernels.quantized.packing import row_chunks
from graphopt.kernels.quantized.triton_scales import dequantize
from graphopt.kernels.quantized.weight import QuantizedWeight

_PIECE = 1 << 25
"""Numbers of a weight that are held at once, dequantized: 64 MiB in two bytes."""
_ROWS, _WIDE = 16, 256
"""Of a tile."""


def dequantized(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`weight_only` by torch's product with the numbers, made in pieces: for many rows."""
    made = x.new_empty((len(x), weight.shape[0]))
    bias = None if bias is None else bias.to(x.dtype)
    for rows in row_chunks(*weight.shape, _PIECE):
        part = numbers(weight.select(rows), x.dtype)
        made[:, rows] = F.linear(x, part, None if bias is None else bias[rows])
    return made


def input_gradient(grad: Tensor, weight: QuantizedWeight) -> Tensor:
    """``grad (M, N) @ W``, ``(M, K)``: pieces summed in float32."""
    pieces = list(row_chunks(*weight.shape, _PIECE))
    if len(pieces) == 1:
        return grad @ numbers(weight, grad.dtype)
    made = grad.new_zeros((len(grad), weight.width), dtype=torch.float32)
    for rows in pieces:
        made += grad[:, rows] @ numbers(weight.select(rows), grad.dtype)
    return made.to(grad.dtype)


def numbers(weight: QuantizedWeight, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """The weight ``(N, K)``, or the listed rows of it ``(n,)``; NaN for one that is not there."""
    scheme = weight.scheme
    count = weight.shape[0] if rows is None else len(rows)
    out = torch.empty((count, weight.width), dtype=dtype, device=weight.codes.device)
    if not out.numel():
        return out
    with on(out):
        dequantize[(-(-count // _ROWS), -(-weight.width // _WIDE))](
            *stored(weight),
            rows,
            out,
            count,
            *weight.shape,
            scheme.row_codes(weight.width) // 4,
            weight.scales.shape[1],
            BITS=scheme.bits,
            FORMAT=scheme.dtype,
            GROUP=scheme.group_size or 0,
            BLOCK_N=_ROWS,
            BLOCK_K=_WIDE,
        )
    return out


Stored = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def stored(weight: QuantizedWeight) -> Stored:
    """What kernels read, contiguous: codes as words, scales, zeros, tensor scale, table."""
    zeros = None if weight.zeros is None else weight.zeros.contiguous()
    table = _table(weight.codes.device) if weight.scheme.dtype == "nf4" else None
    return words(weight.codes), weight.scales.contiguous(), zeros, weight.tensor_scale, table


def words(codes: Tensor) -> Tensor:
    """Rows of int32; copied where they do not begin at a multiple of 16 bytes."""
    rows = codes.contiguous().view(torch.uint8)
    return (rows.clone() if rows.data_ptr() % 16 else rows).view(torch.int32)


@cache
def _table(device: torch.device) -> Tensor:
    return tables.table("nf4").to(device)
