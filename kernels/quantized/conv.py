"""``graphopt::quantized_conv``: convolutions of one to three dimensions; see `conv_paths`.

``x (B, C, *sizes)`` to ``(B, N, *places)``. The weight ``(N, C / groups, *kernel)`` is stored as a
matrix whose rows count channels last: ``(N, prod(kernel) * C / groups)``. Its gradient is that of
the convolution with the dequantized weight, for quantized activations too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.quantized.conv_paths import Case, Window, choose, numbers
from graphopt.kernels.quantized.operator import check_call
from graphopt.kernels.quantized.registration import (
    SCHEME,
    STATIC,
    WEIGHT,
    autocast,
    differentiate,
    register,
)
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.static import Static, read
from graphopt.kernels.quantized.weight import QuantizedWeight

_WINDOW = "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups"


def conv(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    activations: str = "none",
    static: Static | None = None,
) -> Tensor:
    """``x (B, C, *sizes)`` to ``(B, N, *places)`` in the dtype of x.

    Args:
        weight: ``(N, prod(kernel) * C / groups)``, channels last in a row.
        activations: ``"none"``; ``"dynamic"``, which rounds each sample of x to 8 bits; or
            ``"static"``, which rounds x by ``static``.

    Raises:
        ValueError: shapes do not fit, or the scheme has no such activations.
    """
    return quantized_conv(
        x,
        *weight.operands,
        bias,
        list(kernel),
        list(stride),
        list(padding),
        list(dilation),
        groups,
        *weight.scheme.arguments,
        activations,
        *(static or ()),
    )


def _window(settings: Sequence[Any]) -> Window:
    kernel, stride, padding, dilation, groups = settings
    return Window(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups)


def _read(
    x: Tensor, stored: Sequence[Any], settings: Sequence[Any]
) -> tuple[QuantizedWeight, Window]:
    """The weight and the window of a call, checked without reading a number."""
    window, scheme = _window(settings[:5]), Scheme(*settings[5:9])
    lengths = {len(part) for part in window[:4]}
    if lengths != {x.ndim - 2} or x.ndim not in (3, 4, 5):
        raise ValueError(
            f"input {tuple(x.shape)} is (B, C, *sizes), with 1 to 3 sizes, and as many numbers in "
            f"each of kernel, stride, padding, dilation, not {window[:4]}"
        )
    if x.shape[1] % window.groups or stored[0].shape[0] % window.groups:
        raise ValueError(f"{window.groups} groups do not divide the channels")
    width = torch.Size(window.kernel).numel() * (x.shape[1] // window.groups)
    return QuantizedWeight(scheme, width, *stored), window


def _conv(input: Tensor, *call: Any) -> Tensor:
    weight, window = _read(input, call[:4], call[5:14])
    static = _checked(input, weight, call)
    device, sizes = input.device.type, tuple(input.shape)
    case = Case(weight.scheme, call[14], input.dtype, device, window, weight.shape[0], sizes)
    with torch.no_grad():
        made = choose(case, input, weight, *static)(input, weight, call[4], window, *static)
    return made.contiguous(memory_format=_format(input))


def _checked(x: Tensor, weight: QuantizedWeight, call: Sequence[Any]) -> tuple[()] | tuple[Static]:
    """What static activations are quantized by, if they are."""
    check_call(x, call[4], weight.shape[0], weight.scheme, call[14])
    static = read(*call[14:])
    return () if static is None else (static,)


def _format(x: Tensor) -> torch.memory_format:
    """Of the result: that of the input, as for convolutions."""
    last = torch.channels_last
    is_last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=last)
    return last if is_last else torch.contiguous_format


def _fake(input: Tensor, *call: Any) -> Tensor:
    weight, window = _read(input, call[:4], call[5:14])
    _checked(input, weight, call)
    shape = (input.shape[0], weight.shape[0], *window.places(tuple(input.shape[2:])))
    return input.new_empty(shape).contiguous(memory_format=_format(input))


def _conv_backward(grad: Tensor, *call: Any) -> Tensor:
    shape, window = call[4], _window(call[5:10])
    width = torch.Size(window.kernel).numel() * (shape[1] // window.groups)
    weight = QuantizedWeight(Scheme(*call[10:14]), width, *call[:4])
    with torch.no_grad():
        found = numbers(weight, window, grad.dtype)
        like = grad.new_empty(1).expand(shape)  # only its shape is read
        settings = (list(window.stride), list(window.padding), list(window.dilation), False)
        none, asked = [0] * len(window.stride), [True, False, False]
        made: Tensor = torch.ops.aten.convolution_backward(
            grad, like, found, None, *settings, none, window.groups, asked
        )[0]
    return made.contiguous()


def _fake_backward(grad: Tensor, *call: Any) -> Tensor:
    return grad.new_empty(tuple(call[4]))


quantized_conv = register(
    f"quantized_conv(Tensor input, {WEIGHT}, Tensor? bias, {_WINDOW}, {SCHEME}, str activations, "
    f"{STATIC}) -> Tensor",
    _conv,
    _fake,
)
quantized_conv_backward = register(
    f"quantized_conv_backward(Tensor grad, {WEIGHT}, SymInt[] shape, {_WINDOW}, {SCHEME})"
    " -> Tensor",
    _conv_backward,
    _fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, *stored, bias = inputs[:6]
    ctx.save_for_backward(*stored)
    ctx.shape, ctx.settings, ctx.count = x.shape, inputs[6:15], len(inputs)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiated(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_input = d_bias = None
    if ctx.needs_input_grad[0]:
        d_input = quantized_conv_backward(grad, *ctx.saved_tensors, ctx.shape, *ctx.settings)
    if ctx.needs_input_grad[5]:
        d_bias = grad.transpose(0, 1).flatten(1).sum(1).to(ctx.bias_dtype)
    return d_input, None, None, None, None, d_bias, *[None] * (ctx.count - 6)


def _setup_again(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:5])
    ctx.settings = (None, *inputs[6:15], "none")


def _differentiated_again(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return quantized_conv(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 14


differentiate(quantized_conv, _differentiated, _setup)
differentiate(quantized_conv_backward, _differentiated_again, _setup_again)
autocast(quantized_conv)
