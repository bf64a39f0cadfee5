"""How the Triton kernels are called, each with ``x (M, K)`` and a plain weight ``(N, K)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.quantized.gpu import on
from graphopt.kernels.quantized.static import Static
from graphopt.kernels.quantized.triton_dynamic import (
    dynamic,
    quantize_rows,
    quantize_static,
    rescale,
)
from graphopt.kernels.quantized.triton_numbers import (
    dequantized,
    input_gradient,
    numbers,
    stored,
    words,
)
from graphopt.kernels.quantized.triton_weight_only import add_spans
from graphopt.kernels.quantized.triton_weight_only import weight_only as _weight_only
from graphopt.kernels.quantized.weight import QuantizedWeight

__all__ = [
    "by_int_mm",
    "by_scaled_mm",
    "dequantized",
    "dynamic_rows",
    "input_gradient",
    "numbers",
    "rows_quantized",
    "static_rows",
    "weight_only",
]

_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_TILE, _WAVES, _SPAN = 64, 4, 1024
"""Output channels of a tile, about; tiles for each multiprocessor; K of a span, at least."""
_FLAT = 1024


def weight_only(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` in the dtype of x, float32, bfloat16 or float16; codes are read packed."""
    x = x if x.stride(1) == 1 else x.contiguous()
    kind = _KINDS[x.dtype]
    scheme, read = weight.scheme, stored(weight)

    def launch(out: Tensor, bias: Tensor | None, spans: int) -> None:
        _weight_only[_grid(x, weight, spans)](
            x,
            *read,
            bias,
            out,
            *_sizes(x, weight),
            x.stride(0),
            spans,
            BITS=scheme.bits,
            FORMAT=scheme.dtype,
            KIND=kind,
            GROUP=scheme.group_size or 0,
            PRECISION=_precision(),
        )

    return _in_spans(launch, x, weight, bias)


def dynamic_rows(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The same with rows of x quantized; formats ``int`` and ``fp8``."""
    return _rescaled(x, *rows_quantized(x, weight.scheme.dtype), weight, bias)


def static_rows(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, given: Static) -> Tensor:
    """The same with x quantized by one scale and a zero point, whose part the bias takes in."""
    if given.signed:
        zero = torch.full((1, weight.width), given.signed, dtype=torch.int8, device=x.device)
        scale = torch.full((1,), given.scale, device=x.device)
        wide = zero.new_empty(zero.shape, dtype=torch.float32)
        shift = _rescaled(wide, zero, scale, weight, None)[0]
        bias = -shift if bias is None else bias.to(torch.float32) - shift
    return _rescaled(x, *_static_codes(x, given), weight, bias)


def _static_codes(x: Tensor, given: Static) -> tuple[Tensor, Tensor]:
    """Signed codes ``(M, K)`` and scales ``(M,)`` of ``x (M, K)``."""
    x = x if x.stride(1) == 1 else x.contiguous()
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((len(x),), dtype=torch.float32, device=x.device)
    block = min(4096, 1 << (x.shape[1] - 1).bit_length())
    if len(x):
        with on(x):
            quantize_static[(len(x),)](
                x,
                q,
                scales,
                x.shape[1],
                x.stride(0),
                given.scale,
                float(given.signed),
                BLOCK=block,
            )
    return q, scales


def _rescaled(
    x: Tensor, q: Tensor, q_scales: Tensor, weight: QuantizedWeight, bias: Tensor | None
) -> Tensor:
    """The product of codes of x with a weight, in the dtype of x."""
    scheme, codes = weight.scheme, weight.codes.contiguous()
    read = codes if scheme.bits == 8 else words(codes)

    def launch(out: Tensor, bias: Tensor | None, spans: int) -> None:
        dynamic[_grid(x, weight, spans)](
            q,
            q_scales,
            read,
            weight.scales.contiguous(),
            None if weight.zeros is None else weight.zeros.contiguous(),
            bias,
            out,
            *_sizes(x, weight),
            spans,
            BITS=scheme.bits,
            FORMAT=scheme.dtype,
            GROUP=scheme.group_size or 0,
        )

    return _in_spans(launch, x, weight, bias)


def rows_quantized(x: Tensor, dtype: str, rows: int = 0) -> tuple[Tensor, Tensor]:
    """Codes ``(M, K)`` and scales ``(M,)`` of ``x (M, K)``; zeros up to ``rows`` rows at least."""
    x = x if x.stride(1) == 1 else x.contiguous()
    count, width = x.shape
    code = torch.float8_e4m3fn if dtype == "fp8" else torch.int8
    held = max(count, rows)
    make = torch.empty if held == count else torch.zeros
    q = make((held, width), dtype=code, device=x.device)
    scales = make((held,), dtype=torch.float32, device=x.device)
    block = min(4096, 1 << (width - 1).bit_length())
    if count:
        with on(x):
            quantize_rows[(count,)](
                x, q, scales, width, x.stride(0), FLOAT=dtype == "fp8", BLOCK=block
            )
    return q, scales


def by_int_mm(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`dynamic_rows` for symmetric int8 by torch's own product, which wants more than 16 rows."""
    q, q_scales = rows_quantized(x, "int", rows=32)
    products = torch._int_mm(q, weight.codes.t())[: len(x)]
    out = x.new_empty(products.shape)
    if len(x):
        with on(x):
            rescale[(-(-out.numel() // _FLAT),)](
                products,
                q_scales,
                weight.scales.contiguous(),
                bias,
                out,
                out.numel(),
                out.shape[1],
                BLOCK=_FLAT,
            )
    return out


def by_scaled_mm(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """`dynamic_rows` for E4M3 by torch's own product of rows and channels with scales."""
    q, q_scales = rows_quantized(x, "fp8")
    made = torch._scaled_mm(
        q,
        weight.codes.t(),
        scale_a=q_scales[:, None],
        scale_b=weight.scales.t().to(torch.float32).contiguous(),
        out_dtype=x.dtype,
        use_fast_accum=False,
    )
    return made if bias is None else made.add_(bias)


def _in_spans(
    launch: Callable[[Tensor, Tensor | None, int], None],
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
) -> Tensor:
    """The result of a kernel, whole or as the sum of its parts in float32."""
    out = x.new_empty((len(x), weight.shape[0]))
    if not out.numel():
        return out
    spans = _spans(len(x), *weight.shape, x.device)
    with on(x):
        if spans == 1:
            launch(out, bias, 1)
            return out
        parts = x.new_empty((spans, *out.shape), dtype=torch.float32)
        launch(parts, None, spans)
        add_spans[(-(-out.numel() // _FLAT),)](
            parts, bias, out, spans, out.numel(), out.shape[1], BLOCK=_FLAT
        )
    return out


def _spans(rows: int, outputs: int, inputs: int, device: torch.device) -> int:
    """Parts of K that are summed apart, where tiles of the result alone do not fill the GPU."""
    if rows > 64:
        return 1
    tiles = -(-outputs // _TILE)
    return max(1, min(_WAVES * _processors(device) // tiles, inputs // _SPAN, 8))


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _grid(x: Tensor, weight: QuantizedWeight, spans: int) -> Callable[[Any], tuple[int, int, int]]:
    """Neighbours have the same rows of x and follow each other along N."""
    outputs = weight.shape[0]
    return lambda c: (-(-outputs // c["BLOCK_N"]), -(-len(x) // c["BLOCK_M"]), spans)


def _sizes(x: Tensor, weight: QuantizedWeight) -> tuple[int, ...]:
    """M, M rounded up to what is chosen for, N, K, words in a row, and groups."""
    bucket = max(16, 1 << (len(x) - 1).bit_length())
    row_words = weight.scheme.row_codes(weight.width) // 4
    return len(x), bucket, *weight.shape, row_words, weight.scales.shape[1]


def _precision() -> str:
    """Of float32 products: full, unless torch is told otherwise."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
