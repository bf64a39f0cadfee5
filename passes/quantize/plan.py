"""What becomes of each weight: chosen by methods that see it alone, or by calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, fx

from graphopt.calibration import Statistics, Stream
from graphopt.errors import GraphoptError
from graphopt.kernels.quantized.autograd import linear
from graphopt.kernels.quantized.gptq import gptq
from graphopt.kernels.quantized.hqq import hqq
from graphopt.kernels.quantized.rounding import Clip, quantize
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight
from graphopt.passes.quantize.methods import Methods
from graphopt.program import Program
from graphopt.rewrite import Match, arguments
from graphopt.source import source_line

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
    return _Calibration(program, matches, samples, settings, progress).run()


@dataclass(frozen=True)
class Settings:
    """Scheme of the weights, how they get there, and whether activations are quantized too."""

    scheme: Scheme
    methods: Methods
    activations: str = "none"


class _Calibration:
    def __init__(
        self,
        program: Program,
        matches: Sequence[Match],
        samples: Sequence[Sequence[Any]],
        settings: Settings,
        progress: Progress,
    ) -> None:
        self.program, self.settings, self.progress = program, settings, progress
        self.pending = {m["weight"]: list(m.nodes) for m in matches}
        products = {node: m["weight"] for m in matches for node in m.nodes}
        self.products = {n: products[n] for n in program.graph.nodes if n in products}
        self.stream = Stream(program, samples, list(products))
        self.statistics: dict[fx.Node, Statistics] = {}
        self.weights: dict[str, QuantizedWeight] = {}
        self.notes: dict[str, str] = {}

    def run(self) -> Plan:
        total = len(self.pending)
        for product, weight in self.products.items():
            self.stream.advance(product)
            self._collect(product)
            self.pending[weight].remove(product)
            if not self.pending[weight]:
                self._quantize(weight)
                self.progress(f"calibrated {len(self.weights)} of {total} weights")
        return Plan(self.weights, self.notes)

    def _collect(self, product: fx.Node) -> None:
        given = _given(product)
        if given in self.statistics:
            return
        try:
            self.statistics[given] = Statistics.of(self.stream.given(given))
        except ValueError as error:
            raise GraphoptError(
                f"{self.program.name}: {error} at `{product.name}`",
                where=source_line(product) or product.name,
                fix="leave those inputs out, or correct their values",
            ) from error

    def _quantize(self, weight: fx.Node) -> None:
        name = self.program.target_of(weight) or weight.name
        mine = [n for n, w in self.products.items() if w is weight]
        stored = self._stored(name, self.program.state[name], mine)
        self.weights[name] = stored
        if self.settings.activations == "none":
            self.stream.weight(weight, stored.dequantize(self.program.state[name].dtype))
        for product in mine:
            if self.settings.activations != "none":
                self.stream.replace(product, partial(_product, stored, self.settings.activations))
        self._forget(mine)

    def _stored(self, name: str, weight: Tensor, products: Iterable[fx.Node]) -> QuantizedWeight:
        seen = [self.statistics[_given(n)] for n in products]
        if not sum(s.rows for s in seen):
            self.notes[name] = f"`{name}` saw no calibration rows: it is rounded to nearest"
            return rounded(weight, self.settings.scheme, self.settings.methods)
        moment = sum((s.moment for s in seen[1:]), seen[0].moment)
        return gptq(weight, self.settings.scheme, moment)

    def _forget(self, products: Iterable[fx.Node]) -> None:
        """Drop statistics that no weight to come reads."""
        wanted = {_given(n) for n, weight in self.products.items() if self.pending[weight]}
        for given in {_given(n) for n in products} - wanted:
            self.statistics.pop(given, None)


def _given(product: fx.Node) -> fx.Node:
    node: fx.Node = arguments(product)["input"]
    return node


def _product(
    stored: QuantizedWeight, activations: str, x: Tensor, _weight: Tensor, bias: Any = None
) -> Tensor:
    return linear(x, stored, bias, activations)
