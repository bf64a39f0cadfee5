"""What becomes of each weight: chosen by methods that see it alone, or by calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.kernels.quantized.autograd import linear
from graphopt.kernels.quantized.gptq import gptq
from graphopt.kernels.quantized.hqq import hqq
from graphopt.kernels.quantized.rounding import Clip, quantize
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight
from graphopt.passes.quantize.methods import Methods
from graphopt.passes.quantize.observed import Observed
from graphopt.program import Program
from graphopt.rewrite import Match

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What calibration made of weights, by their names; ``notes`` say where it had to give way."""

    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


def rounded(weight: Tensor, scheme: Scheme, methods: Methods) -> QuantizedWeight:
    """A weight by itself: to nearest, after a search for ranges below 8 bits, or by HQQ."""
    clip: Clip = "search" if scheme.packed else "none"
    if methods.rounding == "hqq":
        return hqq(weight, scheme, clip)
    return quantize(weight, scheme, clip)


def calibrate(
    program: Program,
    matches: Sequence[Match],
    samples: Sequence[Sequence[Any]],
    settings: Settings,
    progress: Progress,
) -> Plan:
    """Every weight in turn, on what its products are given when those before it are quantized.

    Args:
        matches: products on one weight each, under ``"weight"``.
        samples: flat user inputs.

    Raises:
        GraphoptError: samples hold NaN where a weight is calibrated, or the model fails on one.
    """
    return _Calibration(program, matches, samples, settings).run(progress)


@dataclass(frozen=True)
class Settings:
    """Scheme of the weights, how they get there, and whether activations are quantized too."""

    scheme: Scheme
    methods: Methods
    activations: str = "none"
    tolerance: float | None = None


class _Calibration:
    def __init__(
        self,
        program: Program,
        matches: Sequence[Match],
        samples: Sequence[Sequence[Any]],
        settings: Settings,
    ) -> None:
        self.program, self.settings = program, settings
        self.weight_of = {node: m["weight"] for m in matches for node in products_of(m)}
        self.observed = Observed(program, samples, self.weight_of)
        self.weights: dict[str, QuantizedWeight] = {}
        self.notes: dict[str, str] = {}

    def run(self, progress: Progress) -> Plan:
        total = len(set(self.weight_of.values()))
        while self.observed.left:
            weight = self.weight_of[self.observed.next()]
            pending = {self.weight_of[n] for n in self.observed.left}
            if weight in pending:  # calibrated where it is read last
                continue
            self._quantize(weight)
            self.observed.keep(n for n, w in self.weight_of.items() if w in pending)
            progress(f"calibrated {len(self.weights)} of {total} weights")
        return Plan(self.weights, self.notes)

    def _quantize(self, weight: fx.Node) -> None:
        name = self.program.target_of(weight) or weight.name
        tensor, stream = self.program.state[name], self.observed.stream
        products = [n for n, w in self.weight_of.items() if w is weight]
        stored = self._stored(name, tensor, products)
        self.weights[name] = stored
        if self.settings.activations == "none":
            stream.weight(weight, stored.dequantize(tensor.dtype))
            return
        for product in products:
            stream.replace(product, partial(_product, stored, self.settings.activations))

    def _stored(self, name: str, weight: Tensor, products: Sequence[fx.Node]) -> QuantizedWeight:
        scheme, methods = self.settings.scheme, self.settings.methods
        seen = self.observed.of(products)
        if not sum(s.rows for s in seen):
            self.notes[name] = f"`{name}` saw no calibration rows: it is rounded to nearest"
            return rounded(weight, scheme, methods)
        moment = sum((s.moment for s in seen[1:]), seen[0].moment)
        if methods.rounding == "gptq":
            return gptq(weight, scheme, moment)
        return quantize(weight, scheme, "search", moment.diagonal())


def products_of(match: Match) -> list[fx.Node]:
    """Those of a match: look-ups of a tied head have no inputs to calibrate on."""
    return [n for n in match.nodes if n.target is torch.ops.aten.linear.default]


def _product(
    stored: QuantizedWeight, activations: str, x: Tensor, _weight: Tensor, bias: Any = None
) -> Tensor:
    return linear(x, stored, bias, activations)
