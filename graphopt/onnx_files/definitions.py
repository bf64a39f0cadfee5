"""Operators in float64 where onnx's reference implementation is slow, or is seen to be wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx.reference.op_run import OpRun
from torch import Tensor
from torch.nn import functional

Array = np.ndarray[Any, Any]


class Erf(OpRun):
    """Not number by number."""

    def _run(self, x: Array) -> tuple[Array]:
        return (torch.erf(_tensor(x)).numpy(),)


class GatherElements(OpRun):
    """Of the data, other axes count as far as the indices go."""

    def _run(self, data: Array, indices: Array, axis: int = 0) -> tuple[Array]:
        axis = axis or 0
        wanted = [slice(n) for n in indices.shape]
        wanted[axis] = slice(None)
        return (np.take_along_axis(data[tuple(wanted)], indices, axis),)


class Conv(OpRun):
    """By torch; padding that depends on the input's size it leaves alone."""

    def _run(
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        auto_pad: str | None = None,
        dilations: list[int] | None = None,
        group: int | None = None,
        kernel_shape: list[int] | None = None,  # noqa: ARG002 - the weight has it
        pads: list[int] | None = None,
        strides: list[int] | None = None,
    ) -> tuple[Array]:
        axes = x.ndim - 2
        given = _padded(x, axes, auto_pad, pads, 0.0)
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
        weight, bias = _tensor(w), None if b is None else _tensor(b)
        made = convolve(
            given, weight, bias, _each(strides, axes), 0, _each(dilations, axes), group or 1
        )
        return (made.numpy(),)


class MaxPool(OpRun):
    """By torch, without indices."""

    def _run(
        self,
        x: Array,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        dilations: list[int] | None = None,
        kernel_shape: list[int] | None = None,
        pads: list[int] | None = None,
        storage_order: int | None = None,  # noqa: ARG002 - of indices
        strides: list[int] | None = None,
    ) -> tuple[Array]:
        if ceil_mode or len(self.onnx_node.output) > 1:
            raise NotImplementedError("MaxPool with ceil_mode or indices")
        axes = x.ndim - 2
        given = _padded(x, axes, auto_pad, pads, -np.inf)
        pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[axes - 1]
        sizes = _each(kernel_shape, axes)
        return (pool(given, sizes, _each(strides, axes), 0, _each(dilations, axes)).numpy(),)


class AveragePool(OpRun):
    """By torch, where padding is even."""

    def _run(
        self,
        x: Array,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        count_include_pad: int | None = None,
        dilations: list[int] | None = None,
        kernel_shape: list[int] | None = None,
        pads: list[int] | None = None,
        strides: list[int] | None = None,
    ) -> tuple[Array]:
        axes = x.ndim - 2
        held = list(pads or [0] * 2 * axes)
        plain = all(n == 1 for n in _each(dilations, axes)) and not ceil_mode
        if not plain or held[:axes] != held[axes:] or auto_pad not in (None, "", "NOTSET"):
            raise NotImplementedError("AveragePool with ceil_mode, dilations or uneven padding")
        if any(2 * p > n for p, n in zip(held, _each(kernel_shape, axes), strict=False)):
            raise NotImplementedError("AveragePool with more padding than half of its kernel")
        pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[axes - 1]
        sizes, counts = _each(kernel_shape, axes), bool(count_include_pad)
        return (pool(_tensor(x), sizes, _each(strides, axes), held[:axes], False, counts).numpy(),)


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _each(given: list[int] | None, axes: int) -> tuple[int, ...]:
    return tuple(given) if given else (1,) * axes


def _padded(
    x: Array, axes: int, auto_pad: str | None, pads: list[int] | None, value: float
) -> Tensor:
    """The input padded: the standard lists begins, then ends; torch, the last axis first."""
    if auto_pad not in (None, "", "NOTSET", "VALID") or axes not in (1, 2, 3):
        raise NotImplementedError(f"auto_pad {auto_pad} of {axes} axes")
    held = list(pads or [0] * 2 * axes) if auto_pad != "VALID" else [0] * 2 * axes
    ends = [n for axis in reversed(range(axes)) for n in (held[axis], held[axis + axes])]
    return functional.pad(_tensor(x), ends, value=value)


OPERATORS = [Erf, GatherElements, Conv, MaxPool, AveragePool]
"""What `onnx.reference.ReferenceEvaluator` takes as ``new_ops``."""
