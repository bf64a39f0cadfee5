"""``quantized_linear`` of int8 in plain operators, for a compiler to fuse with what stands around.

Rounding the rows goes into the kernel that makes them (a norm, an activation), and rescaling the
integers into the one that reads them. On two cores, all-MiniLM-L6-v2 with 8 x 128 tokens takes 0.6
to 0.7 times as long through Inductor as with the operator as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.quantized import int4pack
from graphopt.kernels.quantized.operator import quantized_linear_backward
from graphopt.kernels.quantized.static import LAST, MIDDLE, Static, row_factors

_LEAST = 1e-37
"""Of a scale: what is divided by it is finite."""


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x (..., K)`` to ``(..., N)``: what `definition.dynamic` computes, on a CPU.

    Args:
        codes: int8 ``(N, K)``, K at least 2.
        scales: ``(N, 1)``.
        bias: ``(N,)`` or None; its gradient and that of x are those of ``quantized_linear``.
    """
    made = _Product.apply(x, codes, scales)
    return made.to(x.dtype) if bias is None else (made + bias).to(x.dtype)


def int4_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group_size: int,
    symmetric: bool,
) -> Tensor:
    """``x (..., K)`` to ``(..., N)`` with a weight of 4 bits in the layout ``"int4pack"``.

    x is rounded to bfloat16. Gradients are those of ``quantized_linear``.
    """
    made = _PackedProduct.apply(x, codes, scales, group_size, symmetric)
    return made if bias is None else made + bias.to(x.dtype)


class _PackedProduct(torch.autograd.Function):
    """Without the bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, group_size: int, symmetric: bool
    ) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.settings = x.shape[-1], 4, "int", group_size, symmetric, "int4pack"
        return int4pack.linear(x, codes, scales)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        codes, scales = ctx.saved_tensors
        made = quantized_linear_backward(grad, codes, scales, None, None, *ctx.settings)
        return made, None, None, None, None


class _Product(torch.autograd.Function):
    """Without the bias and unrounded; straight through the rounding of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.dtype, ctx.width = x.dtype, x.shape[-1]
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = x.reshape(-1, ctx.width).to(wide)
        scale = (rows.abs().amax(-1, keepdim=True) / 127).clamp(min=_LEAST)
        q = (rows * scale.reciprocal()).round().to(torch.int8)
        made = torch._int_mm(q, codes.t()) * scale * scales[:, 0].to(wide)
        return made.reshape(*x.shape[:-1], codes.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _input_gradient(ctx, grad), None, None


def _input_gradient(ctx: Any, grad: Tensor) -> Tensor:
    codes, scales = ctx.saved_tensors
    made: Tensor = quantized_linear_backward(
        grad.to(ctx.dtype), codes, scales, None, None, ctx.width, 8, "int", None, True
    )
    return made


def static_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, scale: float, zero: int
) -> Tensor:
    """The same with static activations: what `static.product` computes, on a CPU.

    Args:
        scale, zero: as a `Static` has them.
    """
    made = _StaticProduct.apply(x, codes, scales, scale, zero)
    return made.to(x.dtype) if bias is None else (made + bias).to(x.dtype)


class _StaticProduct(torch.autograd.Function):
    """As `_Product`. The zero point is a product of one row, whose sums are those of the codes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, scale: float, zero: int
    ) -> Tensor:
        given = Static(scale, zero)
        ctx.save_for_backward(codes, scales)
        ctx.dtype, ctx.width = x.dtype, x.shape[-1]
        rows = x.reshape(-1, ctx.width)
        scaled = rows.to(torch.promote_types(x.dtype, torch.float32)) * (1 / scale)
        signed = (scaled.round() + given.signed).clamp(-MIDDLE, LAST - MIDDLE)
        made = torch._int_mm(signed.to(torch.int8), codes.t())
        if given.signed:
            zeros = torch.full((1, ctx.width), given.signed, dtype=torch.int8)
            made = made - torch._int_mm(zeros, codes.t())
        channels = scales[:, 0].to(scaled.dtype)
        made = made * channels * row_factors(rows, scale)
        return made.reshape(*x.shape[:-1], codes.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _input_gradient(ctx, grad), None, None, None, None
