"""``graphopt::quantized_linear`` and ``graphopt::quantized_embedding``: schemas, what runs, fakes.

A weight comes as the tensors of `QuantizedWeight.tensors` (or of `Path.prepare`, for another
``layout`` than plain) and the fields of its `Scheme`; see `autograd` for gradients and autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.kernels.quantized import gpu, integers, paths, static
from graphopt.kernels.quantized.cases import Case
from graphopt.kernels.quantized.choice import choose
from graphopt.kernels.quantized.int4pack import refusal
from graphopt.kernels.quantized.registration import SCHEME, STATIC, WEIGHT, register
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight

ACTIVATIONS = ("none", "dynamic", "static")
LAYOUTS = ("plain", "int4pack")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    tensor_scale: Tensor | None,
    width: int,
    scheme: Scheme,
    layout: str,
) -> paths.Weight:
    """The weight of a call, checked without reading a number."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if layout == "plain":
        return QuantizedWeight(scheme, width, codes, scales, zeros, tensor_scale)
    outputs = codes.shape[0]
    reason = refusal(scheme, outputs, "cpu")
    if reason is not None:
        raise ValueError(reason)
    found = (codes.dtype, tuple(codes.shape), scales.dtype, tuple(scales.shape))
    stored = (outputs, scheme.row_codes(width)), (scheme.groups(width), outputs, 2)
    if found != (torch.uint8, stored[0], torch.bfloat16, stored[1]):
        raise ValueError(
            f"int4pack has codes torch.uint8 {stored[0]} and scales torch.bfloat16 {stored[1]}, "
            f"not {found[0]} {found[1]} and {found[2]} {found[3]}: prepare them by int4pack.prepare"
        )
    return paths.Stored(scheme, layout, {"codes": codes, "scales": scales}, (outputs, width))


def check_call(
    x: Tensor, bias: Tensor | None, outputs: int, scheme: Scheme, activations: str
) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"input is {x.dtype}; it is float32, bfloat16, float16 or float64")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias is {tuple(bias.shape)}; the weight has {outputs} output channels")
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations {activations!r} are not one of {', '.join(ACTIVATIONS)}")
    if activations == "none":
        return
    if scheme.dtype not in (("int", "fp8") if activations == "dynamic" else ("int",)):
        can = "dtype int and fp8 have" if activations == "dynamic" else "dtype int has"
        raise ValueError(f"{scheme.dtype} has no {activations} activations: {can}")
    if scheme.dtype == "int" and x.shape[-1] > integers.LONGEST:
        raise ValueError(
            f"K = {x.shape[-1]}: sums of products of 8 bits fit 32 up to {integers.LONGEST}; "
            "activations='none' has no such bound"
        )


def _linear(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    dtype: str,
    group_size: int | None,
    symmetric: bool,
    activations: str,
    layout: str = "plain",
    input_scale: float | None = None,
    input_zero: int = static.MIDDLE,
) -> Tensor:
    width, scheme = _width(input), Scheme(bits, dtype, group_size, symmetric)
    weight = _weight(codes, scales, zeros, tensor_scale, width, scheme, layout)
    check_call(input, bias, codes.shape[0], scheme, activations)
    ahead = static.read(activations, input_scale, input_zero)
    extra = () if ahead is None else (ahead,)
    case = Case(scheme, layout, activations, input.dtype, input.device.type, codes.shape[0], width)
    with torch.no_grad(), gpu.on(input):
        rows = input.reshape(-1, width)
        made = choose(case, rows, weight, *extra).run(rows, weight, bias, *extra)
    return made.view(*input.shape[:-1], codes.shape[0])


def _width(input: Tensor) -> int:
    if input.ndim == 0:
        raise ValueError("input is a number; it is (..., K)")
    return input.shape[-1]


def _linear_backward(
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    tensor_scale: Tensor | None,
    width: int,
    bits: int,
    dtype: str,
    group_size: int | None,
    symmetric: bool,
    layout: str = "plain",
) -> Tensor:
    scheme = Scheme(bits, dtype, group_size, symmetric)
    weight = _weight(codes, scales, zeros, tensor_scale, width, scheme, layout)
    with torch.no_grad(), gpu.on(grad):
        made = paths.input_gradient(grad.reshape(-1, codes.shape[0]), weight)
    return made.view(*grad.shape[:-1], width)


def _embedding(
    indices: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    tensor_scale: Tensor | None,
    width: int,
    bits: int,
    dtype: str,
    group_size: int | None,
    symmetric: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    scheme = Scheme(bits, dtype, group_size, symmetric)
    weight = QuantizedWeight(scheme, width, codes, scales, zeros, tensor_scale)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices are {indices.dtype}; they are int32 or int64")
    with torch.no_grad(), gpu.on(indices):
        return paths.embedding(indices, weight, out_dtype)


def _fake_linear(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    dtype: str,
    group_size: int | None,
    symmetric: bool,
    activations: str,
    layout: str = "plain",
    input_scale: float | None = None,
    input_zero: int = static.MIDDLE,
) -> Tensor:
    width, scheme = _width(input), Scheme(bits, dtype, group_size, symmetric)
    _weight(codes, scales, zeros, tensor_scale, width, scheme, layout)
    check_call(input, bias, codes.shape[0], scheme, activations)
    static.read(activations, input_scale, input_zero)
    return input.new_empty((*input.shape[:-1], codes.shape[0]))


def _fake_linear_backward(grad: Tensor, *others: object) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], others[4]))


def _fake_embedding(indices: Tensor, codes: Tensor, *others: object) -> Tensor:
    return codes.new_empty((*indices.shape, others[3]), dtype=others[-1])


quantized_linear = register(
    f"quantized_linear(Tensor input, {WEIGHT}, Tensor? bias, {SCHEME}, str activations, "
    f'str layout="plain", {STATIC}) -> Tensor',
    _linear,
    _fake_linear,
)
quantized_linear_backward = register(
    f'quantized_linear_backward(Tensor grad, {WEIGHT}, int width, {SCHEME}, str layout="plain")'
    " -> Tensor",
    _linear_backward,
    _fake_linear_backward,
)
quantized_embedding = register(
    f"quantized_embedding(Tensor indices, {WEIGHT}, int width, {SCHEME}, ScalarType out_dtype)"
    " -> Tensor",
    _embedding,
    _fake_embedding,
)
