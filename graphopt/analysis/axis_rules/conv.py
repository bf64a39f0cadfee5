"""Convolutions, grouped and transposed."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from graphopt.analysis.axis_rules.call import Call, MixKind, Outcome, rule
from graphopt.analysis.axis_rules.labels import Label, Term, combine
from graphopt.analysis.axis_rules.sizes import Shape, Size, Untrackable, quotient
from graphopt.analysis.axis_rules.windows import Window, per_dim, window


@rule("conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding", "conv3d.padding",
      "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "convolution",
      "_convolution")  # fmt: skip
def convolution(call: Call) -> Outcome:
    """``x[n, (g, i), *s], w[(g, o), i, *k] -> out[n, (g, o), *s]``.

    A transposed one has ``w[(g, i), o, *k]``.

    Batch and groups are parallel, as is space where windows tile it (a 1x1 convolution, patches).
    """
    transposed = call.get("transposed", default="transpose" in call.op)
    shape, kernel, result = call.shape(call["input"]), call.shape(call["weight"]), call.results[0]
    space = len(kernel) - 2
    batch = [("n", shape[0])] if len(shape) > space + 1 else []
    groups = call["groups"]
    inputs = [("g", groups), ("i", _divided(shape[-space - 1], groups))]
    outputs = [("g", groups), ("o", _divided(result[-space - 1], groups))]
    windows = _windows(call, shape[-space:], kernel[2:], result[-space:], transposed)
    before = [pair for w in windows for pair in (w.after if transposed else w.before)]
    after = [pair for w in windows for pair in (w.before if transposed else w.after)]
    taps = [(("r", k), size) for k, size in enumerate(kernel[2:])]
    weight = [*inputs, outputs[1], *taps] if transposed else [*outputs, inputs[1], *taps]
    terms = [
        _term(call["input"], [*batch, *inputs, *before]),
        _term(call["weight"], weight),
        _term(call["bias"], outputs),
    ]
    mixed: dict[Label, MixKind] = {("in", k): "convolve" for k in range(space)}
    mixed |= {("out", k): "convolve" for k in range(space)} if transposed else {}
    fixed: list[Label] = ["g", "i", "o"] if groups != 1 else []
    fixed += [tap for tap, _ in taps]
    return combine(call, terms, [_term(None, [*batch, *outputs, *after])], mixed, fixed=fixed)


def _windows(
    call: Call, source: Shape, kernel: Shape, target: Shape, transposed: bool
) -> list[Window]:
    """One window per spatial dim; a transposed convolution reads it backwards."""
    rank = len(kernel)
    padding = 0 if call["padding"] == "valid" else call["padding"]
    settings = [per_dim(value, rank) for value in (call["stride"], padding, call["dilation"])]
    if transposed:
        source, target = target, source
    return [
        window(k, *dims)
        for k, dims in enumerate(zip(source, target, kernel, *settings, strict=True))
    ]


def _divided(channels: Size, groups: Size) -> Size:
    each = quotient(channels, groups)
    if each is None:
        raise Untrackable(f"{channels} channels do not divide into {groups} groups")
    return each


def _term(node: Node | None, dims: Sequence[tuple[Label, Size]]) -> Term:
    return Term(node, [label for label, _ in dims], tuple(size for _, size in dims))
