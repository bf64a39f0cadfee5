"""``graphopt::quantized_experts``: rows in groups, each multiplied by a weight of its own.

``y_i = x_i @ W_e.T`` for the rows i of expert e: ``x (S, K)``, sorted by expert, to ``(S, N)``. The
weights ``(E, N, K)`` are stored as one of ``(E * N, K)``. Expert e has the rows from
``offsets[e - 1]`` to ``offsets[e]``; rows after the last offset become zero. Without offsets all
experts have equally many rows, as in a batched product.

Each expert runs as `quantized_linear` does, on its part of the stored tensors where it lies, so
experts without rows cost nothing. FLOPs are those of the rows that there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.quantized import gpu, paths
from graphopt.kernels.quantized.cases import Case
from graphopt.kernels.quantized.choice import choose
from graphopt.kernels.quantized.operator import check_call
from graphopt.kernels.quantized.registration import (
    SCHEME,
    WEIGHT,
    autocast,
    differentiate,
    register,
)
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight


def experts(
    x: Tensor,
    weight: QuantizedWeight,
    count: int,
    offsets: Tensor | None = None,
    activations: str = "none",
) -> Tensor:
    """Rows ``(S, K)`` by the weights ``(count * N, K)`` of their experts: ``(S, N)``, in the dtype
    of x.

    Args:
        offsets: ``(count,)``, int32 or int64: where the rows of each expert end.
        activations: ``"none"`` or ``"dynamic"``, which rounds each row of x to 8 bits.

    Raises:
        ValueError: shapes do not fit, offsets fall or exceed S, or the scheme has no such
            activations.
    """
    return quantized_experts(
        x,
        offsets,
        *weight.operands,
        count,
        *weight.scheme.arguments,
        activations,
    )


def _check(rows: Tensor, offsets: Tensor | None, outputs: int, count: int) -> None:
    if rows.ndim != 2:
        raise ValueError(f"rows are (S, K), not {tuple(rows.shape)}")
    if count < 1 or outputs % count:
        raise ValueError(f"{outputs} output channels are not those of {count} experts")
    if offsets is not None and (
        offsets.shape != (count,) or offsets.dtype not in (torch.int32, torch.int64)
    ):
        found = f"{offsets.dtype} {tuple(offsets.shape)}"
        raise ValueError(f"offsets are int32 or int64 ({count},), not {found}")


def _parts(
    total: int, offsets: Tensor | None, weight: QuantizedWeight, count: int
) -> Iterator[tuple[slice, QuantizedWeight]]:
    """Rows of each expert that has some, and its weight."""
    if offsets is None:
        if total % count:
            raise ValueError(f"{total} rows are not equally many for {count} experts")
        ends = [(e + 1) * (total // count) for e in range(count)]
    else:
        ends = offsets.tolist()
    bounds = [0, *ends]
    if bounds != sorted(bounds) or bounds[-1] > total:
        raise ValueError(f"offsets {ends} do not rise from 0 to {total}")
    outputs = weight.shape[0] // count
    for e in range(count):
        if bounds[e] < bounds[e + 1]:
            own = weight.select(slice(e * outputs, (e + 1) * outputs))
            yield slice(bounds[e], bounds[e + 1]), own


def _experts(
    input: Tensor,
    offsets: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    tensor_scale: Tensor | None,
    experts: int,
    bits: int,
    dtype: str,
    group_size: int | None,
    symmetric: bool,
    activations: str,
) -> Tensor:
    scheme = Scheme(bits, dtype, group_size, symmetric)
    _check(input, offsets, codes.shape[0], experts)
    check_call(input, None, codes.shape[0], scheme, activations)
    (total, width), outputs = input.shape, codes.shape[0] // experts
    weight = QuantizedWeight(scheme, width, codes, scales, zeros, tensor_scale)
    case = Case(scheme, "plain", activations, input.dtype, input.device.type, outputs, width)
    made = input.new_zeros((total, outputs))
    with torch.no_grad(), gpu.on(input):
        for rows, part in _parts(total, offsets, weight, experts):
            made[rows] = choose(case, input[rows], part).run(input[rows], part, None)
    return made


def _backward(
    grad: Tensor,
    offsets: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    tensor_scale: Tensor | None,
    experts: int,
    width: int,
    bits: int,
    dtype: str,
    group_size: int | None,
    symmetric: bool,
) -> Tensor:
    scheme = Scheme(bits, dtype, group_size, symmetric)
    weight = QuantizedWeight(scheme, width, codes, scales, zeros, tensor_scale)
    made = grad.new_zeros((grad.shape[0], width))
    with torch.no_grad(), gpu.on(grad):
        for rows, part in _parts(grad.shape[0], offsets, weight, experts):
            made[rows] = paths.input_gradient(grad[rows], part)
    return made


def _fake(input: Tensor, offsets: Tensor | None, codes: Tensor, *others: Any) -> Tensor:
    scheme = Scheme(*others[4:8])
    _check(input, offsets, codes.shape[0], others[3])
    check_call(input, None, codes.shape[0], scheme, others[8])
    QuantizedWeight(scheme, input.shape[1], codes, *others[:3])
    return input.new_empty((input.shape[0], codes.shape[0] // others[3]))


def _fake_backward(grad: Tensor, _offsets: Tensor | None, *others: Any) -> Tensor:
    return grad.new_empty((grad.shape[0], others[5]))


quantized_experts = register(
    f"quantized_experts(Tensor input, Tensor? offsets, {WEIGHT}, int experts, {SCHEME}, "
    "str activations) -> Tensor",
    _experts,
    _fake,
)
quantized_experts_backward = register(
    f"quantized_experts_backward(Tensor grad, Tensor? offsets, {WEIGHT}, int experts, int width, "
    f"{SCHEME}) -> Tensor",
    _backward,
    _fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, *stored = inputs[:6]
    ctx.save_for_backward(*stored)
    ctx.settings = (inputs[6], x.shape[-1], *inputs[7:11])


def _differentiated(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    made = quantized_experts_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return made, *[None] * 11


def _setup_again(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[1:6])
    ctx.settings = (inputs[6], *inputs[8:12], "none")


def _differentiated_again(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return quantized_experts(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 11


differentiate(quantized_experts, _differentiated, _setup)
differentiate(quantized_experts_backward, _differentiated_again, _setup_again)
autocast(quantized_experts)
