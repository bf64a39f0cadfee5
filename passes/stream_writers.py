"""Writers of a residual stream, with the mean over features taken out of what they write."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.passes.residual_stream import Stream
from graphopt.program import Program, val
from graphopt.rewrite import Builder, arguments

aten = torch.ops.aten

CONVOLUTIONS = frozenset(
    {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default}
)


def can_centre(program: Program, writer: fx.Node, stream: Stream) -> bool:
    """Whether the writer's own weights can be centred without a copy of them staying alive."""
    if writer.op == "placeholder":
        users = set(writer.users)
        return program.is_constant(writer) and users <= {*stream.inner, *stream.norms}
    linear = scaled_linear(program, writer)
    owned = _weights(linear if linear is not None else writer, writer, stream)
    return bool(owned) and all(_is_own(program, w) for w in owned)


def _is_own(program: Program, weight: Any) -> bool:
    return isinstance(weight, fx.Node) and program.is_constant(weight) and len(weight.users) == 1


def _weights(node: fx.Node, writer: fx.Node, stream: Stream) -> list[Any]:
    """Tensors that would be centred; none for a node that is not known as a writer."""
    given = arguments(node)
    last = stream.values[writer] == val(writer).dim() - 1
    if node.target is aten.embedding.default and last:
        return [given["weight"]]
    if node.target is aten.linear.default and last:
        return [w for w in (given["weight"], given["bias"]) if w is not None]
    channels = stream.values[writer] == 1 and not given.get("transposed", False)
    if (
        node.target in CONVOLUTIONS
        and channels
        and val(given.get("weight")).dim() == val(node).dim()
    ):
        return [w for w in (given["weight"], given["bias"]) if w is not None]
    return []


def scaled_linear(program: Program, writer: fx.Node) -> fx.Node | None:
    """The linear that a constant vector scales (LayerScale), where nothing else reads it."""
    if writer.target is not aten.mul.Tensor:
        return None
    for linear, scale in (writer.args[:2], writer.args[1::-1]):
        if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default:
            continue
        fits = isinstance(scale, fx.Node) and program.is_constant(scale) and val(scale).dim() == 1
        if fits and val(scale).shape[0] == val(linear).shape[-1] and len(linear.users) == 1:
            return linear
    return None


def centred(program: Program, writer: fx.Node, stream: Stream, build: Builder) -> Any:
    """What the writer writes, less its mean over the features."""
    axis = stream.values[writer]
    if not can_centre(program, writer, stream):
        return _less_mean(writer, axis, build)
    if writer.op == "placeholder":
        return _less_mean(writer, axis, build)
    linear = scaled_linear(program, writer)
    if linear is not None:
        scale = writer.args[1] if writer.args[0] is linear else writer.args[0]
        return _linear(linear, scale, build)
    if writer.target is aten.linear.default:
        return _linear(writer, None, build)
    given = arguments(writer)
    features = 1 if writer.target is aten.embedding.default else 0
    given["weight"] = _less_mean(given["weight"], features, build)
    if given.get("bias") is not None:
        given["bias"] = _less_mean(given["bias"], 0, build)
    return build(writer.target, *given.values())


def _linear(linear: fx.Node, scale: fx.Node | None, build: Builder) -> Any:
    """``diag(scale) (W x + b)``, centred."""
    given = arguments(linear)
    weight, bias = given["weight"], given["bias"]
    if scale is not None:
        weight = build(aten.mul.Tensor, weight, build(aten.unsqueeze.default, scale, 1))
        bias = None if bias is None else build(aten.mul.Tensor, bias, scale)
    bias = None if bias is None else _less_mean(bias, 0, build)
    return build(aten.linear.default, given["input"], _less_mean(weight, 0, build), bias)


def _less_mean(node: fx.Node, axis: int, build: Builder) -> Any:
    return build(aten.sub.Tensor, node, build(aten.mean.dim, node, [axis], True))
