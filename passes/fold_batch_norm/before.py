"""A norm before a convolution or linear, or before another norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from graphopt.passes.fold_batch_norm.affine import (
    CONVOLUTIONS,
    FIXED,
    NormFold,
    is_transposed,
    norm_of,
    scale_and_shift,
    scale_columns,
    scale_rows,
    with_weights,
)
from graphopt.passes.fold_batch_norm.examples import IMAGES, ROWS, network, norm, stack
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Example, Match, Refusal, arguments, either, op

aten = torch.ops.aten


class NormBeforeConv(NormFold):
    """``W * (s x + t) + b = (W s) * x + (W * t + b)``, per input channel.

    Padding is 0 after the norm but would be ``-t / s`` before it, and a transposed convolution sums
    fewer taps at its borders: with either, only a norm without shift can be folded.
    """

    benefit = 2
    pattern = op(CONVOLUTIONS, norm_of("x"), ..., name="layer")

    def place_refusal(self, match: Match) -> Refusal | None:
        layer, norm = match["layer"], match["norm"]
        if _shift_is_zero(match.program, norm):
            return None
        if is_transposed(layer):
            return Refusal("the shift of the norm differs at the borders of the result", layer)
        if pads(layer):
            padding = arguments(layer)["padding"]
            return Refusal(f"padding {padding} puts zeros after the norm's shift", layer)
        return None

    def rewrite(self, match: Match, build: Builder) -> Any:
        given = arguments(match["layer"])
        scale, shift = scale_and_shift(build, match["norm"])
        if is_transposed(match["layer"]):
            weight, bias = scale_rows(build, given["weight"], scale), given["bias"]
        else:
            weight = scale_columns(build, given["weight"], scale, given["groups"])
            bias = self._bias(build, given, shift)
        return with_weights(build, match["layer"], match["x"], weight, bias)

    def _bias(self, build: Builder, given: dict[str, Any], shift: Any) -> Any:
        """``b[o] + sum over channels and taps of W[o, c, tap] t[c]``."""
        parts = scale_columns(build, given["weight"], shift, given["groups"])
        added = build(aten.sum.dim_IntList, parts, list(range(1, val(parts).dim())))
        bias = given["bias"]
        return added if bias is None else build(aten.add.Tensor, bias, added)

    def examples(self) -> Iterable[Example]:
        conv, turned = nn.Conv2d, nn.ConvTranspose2d
        yield stack("plain", IMAGES, norm(4), lambda: conv(4, 6, 3))
        yield stack("no bias", IMAGES, norm(4), lambda: conv(4, 6, 3, bias=False))
        yield stack("grouped", IMAGES, norm(4), lambda: conv(4, 6, 3, groups=2))
        yield stack("depthwise", IMAGES, norm(4), lambda: conv(4, 8, 3, groups=4))
        yield stack("valid", IMAGES, norm(4), lambda: conv(4, 6, 3, padding="valid"))
        yield stack("same of one tap", IMAGES, norm(4), lambda: conv(4, 6, 1, padding="same"))
        yield stack("1d", (2, 4, 9), norm(4, 1), lambda: nn.Conv1d(4, 6, 3))
        yield stack("padding without shift", IMAGES, _unshifted, lambda: conv(4, 6, 3, padding=1))
        yield stack(
            "transposed without shift", IMAGES, _unshifted, lambda: turned(4, 6, 3, groups=2)
        )
        yield stack("two norms", IMAGES, norm(4), norm(4), lambda: conv(4, 6, 3), count=2)

    def near_misses(self) -> Iterable[Example]:
        conv, turned = nn.Conv2d, nn.ConvTranspose2d
        yield stack("padding", IMAGES, norm(4), lambda: conv(4, 6, 3, padding=1), reason="padding")
        yield stack(
            "same", IMAGES, norm(4), lambda: conv(4, 6, 3, padding="same"), reason="padding"
        )
        yield stack("transposed", IMAGES, norm(4), lambda: turned(4, 6, 3), reason="borders")
        yield stack("activation between", IMAGES, norm(4), nn.ReLU, lambda: conv(4, 6, 3))
        yield network(
            "used twice",
            IMAGES,
            lambda x, n, c: (c(y := n(x)), y.sin()),
            norm(4),
            _conv,
            reason="also used by",
        )
        yield stack("training", IMAGES, norm(4), _conv, training=True, reason="each batch")


class NormBeforeLinear(NormFold):
    """``W (s x + t) + b = (W s) x + (W t + b)``, where the layer reads the axis of the norm."""

    benefit = 2
    pattern = either(
        op(aten.linear.default, norm_of("x"), ..., name="layer"),
        op(
            aten.linear.default,
            op(aten.transpose.int, norm_of("x"), 1, 2, name="turned"),
            ...,
            name="layer",
        ),
    )

    def place_refusal(self, match: Match) -> Refusal | None:
        rank = val(match["layer"]).dim()
        if rank == (3 if "turned" in match else 2):
            return None
        return Refusal(f"the norm works on axis 1, the layer reads the last of {rank}", match.root)

    def rewrite(self, match: Match, build: Builder) -> Any:
        given = arguments(match["layer"])
        scale, shift = scale_and_shift(build, match["norm"])
        added = build(aten.mv.default, given["weight"], shift)
        bias = added if given["bias"] is None else build(aten.add.Tensor, given["bias"], added)
        weight = scale_columns(build, given["weight"], scale, 1)
        x = match["x"]
        x = build(aten.transpose.int, x, 1, 2) if "turned" in match else x
        return with_weights(build, match["layer"], x, weight, bias)

    def examples(self) -> Iterable[Example]:
        yield stack("rows", ROWS, norm(8, 1), _linear)
        yield stack("no bias", ROWS, norm(8, 1), lambda: nn.Linear(8, 6, bias=False))
        turned = lambda x, n, c: c(n(x).transpose(1, 2))  # noqa: E731
        yield network("tokens", (2, 8, 5), turned, norm(8, 1), _linear)

    def near_misses(self) -> Iterable[Example]:
        yield stack("another axis", (2, 5, 8), norm(5, 1), _linear, reason="axis 1")
        yield network(
            "used twice",
            ROWS,
            lambda x, n, c: (c(y := n(x)), y.sin()),
            norm(8, 1),
            _linear,
            reason="also used by",
        )
        yield stack("training", ROWS, norm(8, 1), _linear, training=True, reason="each batch")


class NormAfterNorm(NormFold):
    """``s (w h + c) + t = (s w) h + (s c + t)``, with ``h`` the standardised input."""

    pattern = norm_of(norm_of("x", "first"))

    def check(self, match: Match) -> Refusal | None:
        if match["first"].target is not FIXED:
            return Refusal("the first norm uses the statistics of each batch", match["first"])
        return super().check(match)

    def rewrite(self, match: Match, build: Builder) -> Any:
        first = arguments(match["first"])
        scale, shift = scale_and_shift(build, match["norm"])
        weight, bias = first["weight"], first["bias"]
        weight = scale if weight is None else build(aten.mul.Tensor, weight, scale)
        moved = None if bias is None else build(aten.mul.Tensor, bias, scale)
        bias = shift if moved is None else build(aten.add.Tensor, moved, shift)
        given = {**first, "weight": weight, "bias": bias}
        return build.item(build(FIXED, *given.values()), 0)

    def examples(self) -> Iterable[Example]:
        yield stack("two", IMAGES, norm(4), norm(4))
        yield stack("three", IMAGES, norm(4), norm(4), norm(4), count=2)
        yield stack("no affine", IMAGES, norm(4, affine=False), norm(4))

    def near_misses(self) -> Iterable[Example]:
        own = norm(4, track_running_stats=False)
        yield stack("batch first", IMAGES, own, norm(4), reason="each batch")
        yield stack("batch second", IMAGES, norm(4), own, reason="each batch")
        yield stack("activation between", IMAGES, norm(4), nn.ReLU, norm(4))


def pads(convolution: fx.Node) -> bool:
    """Whether a convolution reads zeros beyond the border of its input."""
    given = arguments(convolution)
    if isinstance(given["padding"], str):
        taps = val(given["weight"]).shape[2:]
        return given["padding"] == "same" and any(n != 1 for n in taps)
    return any(p != 0 for p in given["padding"])


def _shift_is_zero(program: Program, norm: fx.Node) -> bool:
    given = arguments(norm)
    held = [n for n in (given["bias"], given["running_mean"]) if n is not None]
    return all(program.is_constant(n) and not program.tensor(n).any() for n in held)


def _unshifted() -> nn.Module:
    made = norm(4, affine=False)()
    made.running_mean.zero_()  # type: ignore[union-attr, operator]
    return made


def _conv() -> nn.Module:
    return nn.Conv2d(4, 6, 3)


def _linear() -> nn.Module:
    return nn.Linear(8, 6)
