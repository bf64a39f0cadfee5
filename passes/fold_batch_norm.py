"""BatchNorm in eval mode is a scale and a shift per channel: folded into its neighbour."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.program import val
from graphopt.rewrite import Builder, Example, Match, Pass, Refusal, Rule, arguments, op

aten = torch.ops.aten

CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
PADDED = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
LINEAR = (aten.linear.default,)
NORM = aten._native_batch_norm_legit_no_training.default


def _norm_of(source: Any) -> Any:
    norm = op(NORM, source, "gamma", "beta", "mean", "var", ..., name="norm")
    return op(operator.getitem, norm, 0)


class _Fold(Rule):
    def check(self, match: Match) -> Refusal | None:
        weight = arguments(match["product"])["weight"]
        if val(weight).dtype != match.val("var").dtype:
            return Refusal("product and BatchNorm have different dtypes", match["norm"])
        shared = next((u for u in weight.users if u is not match["product"]), None)
        if match.program.frozen and shared is not None:
            reason = f"the weight is also used by `{shared.name}`: a folded copy would add memory"
            return Refusal(reason, weight)
        return None


class NormAfterProduct(_Fold):
    """``BN(W x + b) = (s W) x + (s (b - mean) + beta)`` with ``s = gamma / sqrt(var + eps)``.

    For convolutions (grouped, depthwise, transposed) and linear layers; Jacob et al. 2018,
    "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    section 3.2.
    """

    benefit = 2
    pattern = _norm_of(op((*CONVS, *PADDED, *TRANSPOSED, *LINEAR), ..., name="product"))

    def check(self, match: Match) -> Refusal | None:
        product = match["product"]
        if product.target in LINEAR and val(product).dim() != 2:
            return Refusal("BatchNorm normalises another axis than the features", match["norm"])
        return super().check(match)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        product = match["product"]
        given = arguments(product)
        scale, shift = scale_and_shift(match, build)
        spread = _over_outputs(product, given, scale, build)
        weight = build(aten.mul.Tensor, given["weight"], spread)
        bias = shift
        if given["bias"] is not None:
            scaled = build(aten.mul.Tensor, given["bias"], scale)
            bias = build(aten.add.Tensor, scaled, shift)
        return _again(product, build, weight=weight, bias=bias)

    def examples(self) -> Iterable[Example]:
        yield Example("conv", lambda: _seq(nn.Conv2d(4, 8, 3, padding=1), 8), _image)
        yield Example("grouped", lambda: _seq(nn.Conv2d(4, 8, 3, groups=2, stride=2), 8), _image)
        yield Example(
            "depthwise", lambda: _seq(nn.Conv2d(4, 4, 3, groups=4, bias=False), 4), _image
        )
        yield Example("same", lambda: _seq(nn.Conv2d(4, 8, 3, padding="same"), 8), _image)
        yield Example("transposed", lambda: _seq(nn.ConvTranspose2d(4, 6, 3, 2), 6), _image)
        yield Example(
            "transposed grouped", lambda: _seq(nn.ConvTranspose2d(4, 6, 3, groups=2), 6), _image
        )
        yield Example("one axis", lambda: _seq(nn.Conv1d(4, 8, 3, dilation=2), 8), _signal)
        yield Example("three axes", lambda: _seq(nn.Conv3d(4, 8, 2), 8), _volume)
        yield Example("linear", lambda: _seq(nn.Linear(8, 6), 6), _rows)
        yield Example("no affine", lambda: _seq(nn.Conv2d(4, 8, 3), 8, affine=False), _image)
        batch = ({0: torch.export.Dim.DYNAMIC},)
        yield Example("dynamic", lambda: _seq(nn.Conv2d(4, 8, 3), 8), _image, batch)
        yield Example("strided", lambda: _seq(nn.Conv2d(4, 8, 3), 8), _strided_image)
        yield Example(
            "in place", lambda: nn.Sequential(_seq(nn.Conv2d(4, 8, 3), 8), nn.ReLU(True)), _image
        )

    def near_misses(self) -> Iterable[Example]:
        yield Example("training", lambda: _seq(nn.Conv2d(4, 8, 3), 8), _image, training=True)
        yield Example("extra user", lambda: _Twice(False), _image, reason="also used by")
        yield Example("returned", lambda: _Twice(True), _image, reason="also an output")
        yield Example("shared weight", _SharedWeight, _image, reason="the weight is also used by")
        yield Example("other axis", _OtherAxis, _signal, reason="another axis than the features")


class NormBeforeProduct(_Fold):
    """``W BN(x) + b = (W s) x + (b + W (beta - mean s))``, over the input channels.

    A convolution that pads is refused: its border would see the shift where the original saw zero.
    """

    pattern = op((*CONVS, *LINEAR), _norm_of("x"), ..., name="product")

    def check(self, match: Match) -> Refusal | None:
        product = match["product"]
        given = arguments(product)
        if product.target in CONVS and any(given["padding"]):
            reason = "the convolution pads with zeros after BatchNorm; its border would change"
            return Refusal(reason, product)
        if product.target in LINEAR and match.val("x").dim() != 2:
            return Refusal("BatchNorm normalises another axis than the features", match["norm"])
        return super().check(match)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        product = match["product"]
        given = arguments(product)
        scale, shift = (
            _over_inputs(product, given, v, build) for v in scale_and_shift(match, build)
        )
        weight = build(aten.mul.Tensor, given["weight"], scale)
        moved = build(aten.mul.Tensor, given["weight"], shift)
        bias = build(aten.sum.dim_IntList, moved, list(range(1, val(given["weight"]).dim())))
        if given["bias"] is not None:
            bias = build(aten.add.Tensor, given["bias"], bias)
        return _again(product, build, input=match["x"], weight=weight, bias=bias)

    def examples(self) -> Iterable[Example]:
        yield Example("conv", lambda: _before(nn.Conv2d(4, 8, 3), 4), _image)
        yield Example(
            "grouped", lambda: _before(nn.Conv2d(4, 8, 3, groups=2, bias=False), 4), _image
        )
        yield Example("linear", lambda: _before(nn.Linear(8, 6), 8), _rows)

    def near_misses(self) -> Iterable[Example]:
        padded = "pads with zeros"
        yield Example(
            "padded", lambda: _before(nn.Conv2d(4, 8, 3, padding=1), 4), _image, reason=padded
        )
        yield Example("training", lambda: _before(nn.Conv2d(4, 8, 3), 4), _image, training=True)
        yield Example("transposed", lambda: _before(nn.ConvTranspose2d(4, 6, 3), 4), _image)


def scale_and_shift(match: Match, build: Builder) -> tuple[Any, Any]:
    """``s = gamma / sqrt(var + eps)`` and ``beta - mean s``, each ``(C,)``."""
    eps = arguments(match["norm"])["eps"]
    scale = build(aten.rsqrt.default, build(aten.add.Tensor, match["var"], eps))
    if match["gamma"] is not None:
        scale = build(aten.mul.Tensor, match["gamma"], scale)
    shift = build(aten.neg.default, build(aten.mul.Tensor, match["mean"], scale))
    if match["beta"] is not None:
        shift = build(aten.add.Tensor, match["beta"], shift)
    return scale, shift


def _over_outputs(product: fx.Node, given: dict[str, Any], vector: Any, build: Builder) -> Any:
    """A value per output channel, shaped to multiply the weight."""
    shape = val(given["weight"]).shape
    rest = [1] * (len(shape) - 2)
    if product.target not in TRANSPOSED:
        return build(aten.reshape.default, vector, [-1, 1, *rest])
    groups, per_group = given["groups"], shape[0] // given["groups"]
    rows = build(aten.reshape.default, vector, [groups, 1, -1])
    rows = build(aten.expand.default, rows, [groups, per_group, shape[1]])
    return build(aten.reshape.default, rows, [shape[0], shape[1], *rest])


def _over_inputs(product: fx.Node, given: dict[str, Any], vector: Any, build: Builder) -> Any:
    """A value per input channel, shaped to multiply the weight."""
    shape = val(given["weight"]).shape
    groups = given.get("groups", 1) if product.target in CONVS else 1
    rows = build(aten.reshape.default, vector, [groups, 1, shape[1]])
    rows = build(aten.expand.default, rows, [groups, shape[0] // groups, shape[1]])
    return build(aten.reshape.default, rows, [shape[0], shape[1], *[1] * (len(shape) - 2)])


def _again(product: fx.Node, build: Builder, **changed: Any) -> fx.Node:
    """The same operator with some arguments replaced."""
    given = {**arguments(product), **changed}
    made: fx.Node = build(product.target, *given.values())
    return made


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNorm (eval mode) into the convolution or linear layer beside it."""

    def rules(self) -> Sequence[Rule]:
        return (NormAfterProduct(), NormBeforeProduct())


_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}


def _norm(product: nn.Module, channels: int, affine: bool = True) -> nn.Module:
    """A BatchNorm that has seen data: no statistic is 0 or 1."""
    norm: Any = _NORMS.get(type(product), nn.BatchNorm2d)(channels, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm  # type: ignore[no-any-return]


def _seq(product: nn.Module, channels: int, affine: bool = True) -> nn.Module:
    return nn.Sequential(product, _norm(product, channels, affine))


def _before(product: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(_norm(product, channels), product)


class _Twice(nn.Module):
    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.conv, self.returned = nn.Conv2d(4, 8, 3), returned
        self.norm = _norm(self.conv, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return (self.norm(y), y) if self.returned else self.norm(y) + y


class _SharedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.norm = _norm(self.conv, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x.sin())


class _OtherAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.norm = _norm(self.linear, 4)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.linear(x))


def _shaped(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape),)


_image, _signal = _shaped(3, 4, 9, 9), _shaped(3, 4, 16)
_volume, _rows = _shaped(2, 4, 5, 5, 5), _shaped(5, 8)


def _strided_image() -> tuple[Tensor, ...]:
    return (torch.randn(3, 9, 9, 4).permute(0, 3, 1, 2),)
