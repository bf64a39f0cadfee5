"""A norm after a convolution or linear: its scale and shift go into weight and bias."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from graphopt.passes.fold_batch_norm.affine import (
    CONVOLUTIONS,
    NormFold,
    is_transposed,
    norm_of,
    scale_and_shift,
    scale_columns,
    scale_rows,
    with_weights,
)
from graphopt.passes.fold_batch_norm.examples import IMAGES, ROWS, fine_tuned, network, norm, stack
from graphopt.program import val
from graphopt.rewrite import Builder, Example, Match, Profit, Refusal, arguments, either, op

aten = torch.ops.aten

_LINEAR = op(aten.linear.default, "x", ..., name="layer")


class NormAfterConv(NormFold):
    """``s * (W * x + b) + t = (s W) * x + (s b + t)`` per output channel, for every convolution.

    A transposed convolution holds its output channels along the second axis, in groups.
    """

    frozen = True
    benefit = 3
    pattern = norm_of(op(CONVOLUTIONS, "x", ..., name="layer"))

    def rewrite(self, match: Match, build: Builder) -> Any:
        given = arguments(match["layer"])
        scale, shift = scale_and_shift(build, match["norm"])
        if is_transposed(match["layer"]):
            weight = scale_columns(build, given["weight"], scale, given["groups"])
        else:
            weight = scale_rows(build, given["weight"], scale)
        bias = _moved(build, given["bias"], scale, shift)
        return with_weights(build, match["layer"], match["x"], weight, bias)

    def examples(self) -> Iterable[Example]:
        conv, turned = nn.Conv2d, nn.ConvTranspose2d
        yield stack("plain", IMAGES, lambda: conv(4, 6, 3), norm(6))
        yield stack("no bias", IMAGES, lambda: conv(4, 6, 3, bias=False), norm(6))
        yield stack("no affine", IMAGES, lambda: conv(4, 6, 3), norm(6, affine=False))
        yield stack("grouped", IMAGES, lambda: conv(4, 6, 3, groups=2), norm(6))
        yield stack("depthwise", IMAGES, lambda: conv(4, 8, 3, groups=4, padding=1), norm(8))
        yield stack("dilated", IMAGES, lambda: conv(4, 6, 3, 2, 2, dilation=2), norm(6))
        yield stack("same", IMAGES, lambda: conv(4, 6, 3, padding="same"), norm(6))
        yield stack("transposed", IMAGES, lambda: turned(4, 6, 3, 2, 1, 1), norm(6))
        yield stack("transposed groups", IMAGES, lambda: turned(4, 6, 3, groups=2), norm(6))
        yield stack("1d", (2, 4, 9), lambda: nn.Conv1d(4, 6, 3), norm(6, 1))
        yield stack("3d", (2, 4, 5, 5, 5), lambda: nn.Conv3d(4, 6, 3), norm(6, 3))
        yield stack("two norms", IMAGES, lambda: conv(4, 6, 3), norm(6), norm(6), count=2)
        yield stack("half", IMAGES, lambda: conv(4, 6, 3), norm(6), dtype=torch.bfloat16)
        rows = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}
        yield stack("dynamic", IMAGES, _conv, norm(6), **rows)
        yield stack("in place after", IMAGES, _conv, norm(6), lambda: nn.ReLU(inplace=True))
        yield network("not contiguous", IMAGES, lambda x, c, n: n(c(x.mT)), _conv, norm(6))

    def near_misses(self) -> Iterable[Example]:
        yield stack("batch", IMAGES, _conv, norm(6, track_running_stats=False), reason="each batch")
        used = {"reason": "also used by"}
        yield network(
            "used twice", IMAGES, lambda x, c, n: n(y := c(x)) + y, _conv, norm(6), **used
        )
        yield network(
            "returned",
            IMAGES,
            lambda x, c, n: (n(y := c(x)), y),
            _conv,
            norm(6),
            reason="also an output",
        )
        twice = lambda x, c, n: n(c(x)) + c(x.sin())  # noqa: E731
        yield network("weight shared", IMAGES, twice, _conv, norm(6), reason="weight is also used")
        yield network("activation between", IMAGES, lambda x, c, n: n(c(x).relu()), _conv, norm(6))
        computed = lambda x, c, n: n(torch.conv2d(x, c.weight * x.mean()))  # noqa: E731
        yield network("weight computed", IMAGES, computed, _conv, norm(6), reason="is computed")


class NormAfterLinear(NormFold):
    """``s * (W x + b) + t = (s W) x + (s b + t)``, where the norm works on the axis of the result.

    That is so for ``(N, C)``, and for ``(N, L, C)`` turned into ``(N, C, L)`` before the norm.
    """

    frozen = True
    benefit = 3
    pattern = either(
        norm_of(_LINEAR), norm_of(op(aten.transpose.int, _LINEAR, 1, 2, name="turned"))
    )

    def place_refusal(self, match: Match) -> Refusal | None:
        rank = val(match["layer"]).dim()
        if rank == (3 if "turned" in match else 2):
            return None
        return Refusal(f"the norm works on axis 1, the layer makes the last of {rank}", match.root)

    def rewrite(self, match: Match, build: Builder) -> Any:
        given = arguments(match["layer"])
        scale, shift = scale_and_shift(build, match["norm"])
        weight = scale_rows(build, given["weight"], scale)
        bias = _moved(build, given["bias"], scale, shift)
        made = with_weights(build, match["layer"], match["x"], weight, bias)
        return build(aten.transpose.int, made, 1, 2) if "turned" in match else made

    def examples(self) -> Iterable[Example]:
        yield stack("rows", ROWS, _linear, norm(6, 1))
        yield stack("no bias", ROWS, lambda: nn.Linear(8, 6, bias=False), norm(6, 1))
        turned = lambda x, c, n: n(c(x).transpose(1, 2)).transpose(1, 2)  # noqa: E731
        yield network("tokens", (2, 5, 8), turned, _linear, norm(6, 1))

    def near_misses(self) -> Iterable[Example]:
        yield stack("another axis", (2, 5, 8), _linear, norm(5, 1), reason="axis 1")
        yield stack("batch", ROWS, _linear, norm(6, 1), training=True)
        twice = lambda x, c, n: n(c(x)) + c(x.sin())  # noqa: E731
        yield network("weight shared", ROWS, twice, _linear, norm(6, 1), reason="also used")


class NormAfterConvInGraph(NormAfterConv):
    """`NormAfterConv` where parameters may change: the weight is scaled at every call.

    That costs a pass over the weight and saves one over the activation; kept where it is faster.
    """

    frozen = False
    profit = Profit.MEASURED

    def examples(self) -> Iterable[Example]:
        yield fine_tuned("fine-tuning", IMAGES, _conv, norm(6))

    def near_misses(self) -> Iterable[Example]:
        yield stack("batch", IMAGES, _conv, norm(6), training=True, reason="each batch")


class NormAfterLinearInGraph(NormAfterLinear):
    """`NormAfterLinear` where parameters may change: the weight is scaled at every call."""

    frozen = False
    profit = Profit.MEASURED

    def examples(self) -> Iterable[Example]:
        yield fine_tuned("fine-tuning", ROWS, _linear, norm(6, 1))

    def near_misses(self) -> Iterable[Example]:
        yield stack("batch", ROWS, _linear, norm(6, 1), training=True, reason="each batch")


def _moved(build: Builder, bias: Any, scale: Any, shift: Any) -> Any:
    """The bias behind the norm: ``s b + t``."""
    if bias is None:
        return shift
    return build(aten.add.Tensor, build(aten.mul.Tensor, bias, scale), shift)


def _conv() -> nn.Module:
    return nn.Conv2d(4, 6, 3)


def _linear() -> nn.Module:
    return nn.Linear(8, 6)
