"""The operators under autograd and autocast, and calls of them with a `QuantizedWeight`.

The gradient of ``quantized_linear`` is that of a product with the dequantized weight, for quantized
activations too (rounding, and the ends of a static range, are passed straight through); its own
derivative is the same product, so that second derivatives are those of the product. Stored tensors
have no gradient: asking for one is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.quantized.operator import (
    quantized_embedding,
    quantized_linear,
    quantized_linear_backward,
)
from graphopt.kernels.quantized.registration import autocast, differentiate
from graphopt.kernels.quantized.static import Static
from graphopt.kernels.quantized.weight import QuantizedWeight


def linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    activations: str = "none",
    static: Static | None = None,
) -> Tensor:
    """``x @ W.T + bias``: ``(..., K)`` to ``(..., N)`` in the dtype of x.

    Args:
        activations: ``"none"``; ``"dynamic"``, which rounds each row of x to 8 bits; or
            ``"static"``, which rounds x by ``static``.

    Raises:
        ValueError: shapes do not fit, or the scheme has no such activations.
    """
    return quantized_linear(
        x,
        *weight.operands,
        bias,
        *weight.scheme.arguments,
        activations,
        *(() if static is None else ("plain", *static)),
    )


def embedding(
    indices: Tensor, weight: QuantizedWeight, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows of the weight: indices ``(...)``, int32 or int64, to ``(..., K)``.

    Raises:
        IndexError: an index is negative or N and more.
    """
    return quantized_embedding(
        indices,
        *weight.operands,
        weight.width,
        *weight.scheme.arguments,
        dtype,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, *stored, bias = inputs[:6]
    layout = inputs[11] if len(inputs) > 11 else "plain"
    ctx.save_for_backward(*stored)
    ctx.count, ctx.bias_dtype = len(inputs), None if bias is None else bias.dtype
    ctx.settings = (x.shape[-1], *inputs[6:10], layout)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_input = d_bias = None
    if ctx.needs_input_grad[0]:
        d_input = quantized_linear_backward(grad, *ctx.saved_tensors, *ctx.settings)
    if ctx.needs_input_grad[5]:
        d_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return d_input, None, None, None, None, d_bias, *[None] * (ctx.count - 6)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, *stored = inputs[:5]
    layout = inputs[10] if len(inputs) > 10 else "plain"
    ctx.save_for_backward(*stored)
    ctx.count, ctx.settings = len(inputs), (*inputs[6:10], "none", layout)


def _backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_grad = quantized_linear(grad, *ctx.saved_tensors, None, *ctx.settings)
    return d_grad, *[None] * (ctx.count - 1)


def _setup_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.count = len(inputs)


def _backward_embedding(ctx: Any, grad: Tensor) -> tuple[None, ...]:  # noqa: ARG001
    return (None,) * ctx.count


differentiate(quantized_linear, _backward, _setup)
differentiate(quantized_linear_backward, _backward_backward, _setup_backward)
differentiate(quantized_embedding, _backward_embedding, _setup_embedding)
autocast(quantized_linear)
