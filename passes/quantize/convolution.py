"""Convolutions with a weight of the model, the weight quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from graphopt.kernels.quantized.weight import OPERANDS
from graphopt.passes.quantize import convolution_examples
from graphopt.passes.quantize.linear import QuantizeLinear, settings_of
from graphopt.passes.quantize.names import USUAL, Scope
from graphopt.passes.quantize.plan import Plan, Settings
from graphopt.passes.quantize.refusals import numbers_refusal, readers
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Profit, Refusal, arguments

aten = torch.ops.aten

_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
)


class QuantizeConvolution(QuantizeLinear):
    """``conv(x, W, b) = quantized_conv(x, Q(W), b)`` but for the rounding of ``Q``.

    An output channel's weights, channels last, are a row of ``Q``. With activations in 8 bits each
    sample has a scale of its own, or all have the one that calibration inputs called for
    (Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", sections
    2.2 and 3); convolutions in groups keep theirs as they are. What is then
    slower here than before is left alone.
    """

    def __init__(self, settings: Settings, plan: Plan, scope: Scope = USUAL) -> None:
        super().__init__(settings, plan, scope)
        self.profit = Profit.ALWAYS if settings.activations == "none" else Profit.MEASURED

    def candidates(self, program: Program) -> Iterator[Candidate]:
        groups: dict[fx.Node, list[fx.Node]] = {}
        for target in _CONVOLUTIONS:
            for weight, found in readers(program, target).items():
                groups.setdefault(weight, []).extend(found)
        for weight, calls in groups.items():
            nodes = tuple(calls)
            yield Candidate(Match(program, nodes, nodes, {"weight": weight}))

    def check(self, match: Match) -> Refusal | None:
        if (found := self._weight_refusal(match)) is not None:
            return found
        if any(arguments(node).get("transposed") for node in match.nodes):
            return Refusal("a transposed convolution has no quantized form", match.root)
        weight = match["weight"]
        return numbers_refusal(_rows(match.program.tensor(weight)), self.settings.scheme, weight)

    def matrices(self, match: Match) -> list[Tensor]:
        return [_rows(match.program.tensor(match["weight"]))]

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        weight = match["weight"]
        held = self.stored(weight, _rows(match.program.tensor(weight)), build)
        pairs = zip(match.nodes, self.activations(match), strict=True)
        return tuple(self._convolution(node, held, given, build) for node, given in pairs)

    def _convolution(
        self,
        node: fx.Node,
        held: dict[str, fx.Node],
        activations: tuple[Any, ...],
        build: Builder,
    ) -> fx.Node:
        build.anchor = node
        given, window = arguments(node), window_of(node)
        count = len(window.stride)
        x, batched = given["input"], val(node).dim() == count + 2
        x = x if batched else build(aten.unsqueeze.default, x, 0)
        if any(window.before):
            x = build(aten.constant_pad_nd.default, x, list(window.before))
        made = build(
            torch.ops.graphopt.quantized_conv.default,
            x,
            *map(held.get, OPERANDS),
            given["bias"],
            list(val(given["weight"]).shape[2:]),
            list(window.stride),
            list(window.padding),
            list(window.dilation),
            given["groups"],
            *self.settings.scheme.arguments,
            *(settings_of(*activations) if given["groups"] == 1 else ("none",)),
        )
        result: fx.Node = made if batched else build(aten.squeeze.dim, made, 0)
        return result

    def examples(self) -> Iterable[Example]:
        return convolution_examples.examples()

    def near_misses(self) -> Iterable[Example]:
        return convolution_examples.near_misses()


class Moves(NamedTuple):
    """Stride, padding on both sides, and dilation, one number per spatial dimension; and what is
    padded before, as ``constant_pad_nd`` takes it."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    before: Sequence[int] = ()


def window_of(node: fx.Node) -> Moves:
    """How a convolution moves; ``padding="same"`` in numbers."""
    given = arguments(node)
    kernel = val(given["weight"]).shape[2:]
    stride, dilation = (_spread(given[k], len(kernel)) for k in ("stride", "dilation"))
    padding = given["padding"]
    if not isinstance(padding, str):
        return Moves(stride, _spread(padding, len(kernel)), dilation)
    if padding == "valid":
        return Moves(stride, [0] * len(kernel), dilation)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    odd = [side for n in reversed(total) for side in (0, n % 2)]
    return Moves(stride, [n // 2 for n in total], dilation, odd if any(odd) else ())


def _spread(given: Any, count: int) -> list[int]:
    numbers = [given] if isinstance(given, int) else list(given)
    return numbers * count if len(numbers) == 1 else numbers


def _rows(weight: Tensor) -> Tensor:
    """``(N, C, *kernel)`` as ``(N, prod(kernel) * C)``."""
    return weight.movedim(1, -1).flatten(1)
