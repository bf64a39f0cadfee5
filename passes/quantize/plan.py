"""What becomes of each weight: chosen by methods that see it alone, or by calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.kernels.quantized.autograd import linear
from graphopt.kernels.quantized.gptq import gptq
from graphopt.kernels.quantized.hqq import hqq
from graphopt.kernels.quantized.remainder import Columns, Part
from graphopt.kernels.quantized.rounding import Clip, quantize
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.split import Beside, Seen, Split, split
from graphopt.kernels.quantized.static import Static
from graphopt.kernels.quantized.weight import QuantizedWeight
from graphopt.passes.quantize import remainder
from graphopt.passes.quantize.layers import Kind, Layers
from graphopt.passes.quantize.methods import Methods
from graphopt.passes.quantize.norms import Affine
from graphopt.passes.quantize.observed import Observed
from graphopt.passes.quantize.propagation import Propagation
from graphopt.program import Program, val
from graphopt.rewrite import Match, Refusal
from graphopt.room import give_back

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What calibration made of weights, by their names, and what stands beside their codes.

    ``notes`` say what that takes, and where a method had to give way. ``inputs`` say how the input
    of each product with a weight is quantized, where that is found ahead of time. ``norms`` are
    scales and shifts that change, by the names of the scales.
    """

    weights: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    remainders: Mapping[str, Sequence[Part]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Sequence[Static | None]] = field(default_factory=dict)
    norms: Mapping[str, Affine] = field(default_factory=dict)


def rounded(
    weight: Tensor, scheme: Scheme, methods: Methods, moment: Tensor | None = None
) -> QuantizedWeight:
    """A weight by itself: to nearest, after a search for ranges below 8 bits, or by HQQ; by GPTQ
    where the second moment of its inputs is known, which else counts in the search."""
    clip: Clip = "search" if scheme.packed else "none"
    if methods.rounding == "hqq":
        return hqq(weight, scheme, clip)
    if moment is None:
        return quantize(weight, scheme, clip)
    if methods.rounding == "gptq":
        return gptq(weight, scheme, moment)
    return quantize(weight, scheme, "search", moment.diagonal())


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
        samples: flat user inputs; without any, each weight is seen alone.

    Raises:
        GraphoptError: samples hold NaN where a weight is calibrated, or the model fails on one.
    """
    return Calibration(program, matches, samples, settings).run(progress)


@dataclass(frozen=True)
class Settings:
    """Scheme of the weights, how they get there, whether activations are quantized too, what stands
    beside codes, the error that is allowed, the steps in which blocks learn, how ranges of static
    activations are found, weights whose format differs, and what rows count by in second moments.
    """

    scheme: Scheme
    methods: Methods
    activations: str = "none"
    beside: Beside = field(default_factory=Beside)
    tolerance: float | None = None
    steps: int = 100
    ranges: str | float = "mse"
    layers: Layers | None = None
    importance: str | None = None

    @property
    def kind(self) -> Kind:
        return Kind(self.scheme, self.activations)

    @property
    def by_rows(self) -> str:
        """The same activations with a scale for each row, where no range is known."""
        return "dynamic" if self.activations == "static" else self.activations

    def of(self, kind: Kind) -> Settings:
        """The same for weights of another format."""
        return replace(self, scheme=kind.scheme, activations=kind.activations)

    def each(self) -> list[Settings]:
        """For each format that there is."""
        return [self.of(k) for k in self.layers.kinds] if self.layers else [self]

    def at(self, program: Program, weight: fx.Node) -> Settings:
        """For one weight."""
        return self.of(self.layers.kind(program, weight)) if self.layers else self

    def refusal(self, program: Program, weight: fx.Node) -> Refusal | None:
        """Why a weight has no format, if it has none."""
        return self.layers.refusal(program, weight) if self.layers else None


def made(
    weight: Tensor, settings: Settings, seen: Seen | None = None, *, looked_up: bool = False
) -> tuple[Split, str]:
    """A weight as codes and what stands beside them, and what there is to say of it.

    Args:
        seen: inputs of its products, where there were any.
        looked_up: embeddings read the weight too, so that nothing can stand beside its codes.
    """
    kind = partial(rounded, scheme=settings.scheme, methods=settings.methods)
    moment = None if seen is None else seen.moment
    if not settings.beside:
        return Split(kind(weight, moment=moment)), ""
    if looked_up:
        reason = "it is looked up too: nothing stands beside it"
        return Split(kind(weight, moment=moment)), reason
    apart = settings.activations != "none"
    found = split(weight, lambda w, m: kind(w, moment=m), settings.beside, seen, apart=apart)
    if found.nbytes >= weight.nbytes:
        reason = f"codes and what is asked for beside them would take {found.nbytes} bytes"
        return Split(
            kind(weight, moment=moment)
        ), f"{reason}, as floats {weight.nbytes}: codes only"
    return found, remainder.told(found.parts, found.super_weights)


class Calibration:
    """Goes through a program, from one weight to the next."""

    def __init__(
        self,
        program: Program,
        matches: Sequence[Match],
        samples: Sequence[Sequence[Any]],
        settings: Settings,
    ) -> None:
        self.program, self.settings = program, settings
        self.looked_up = {m["weight"] for m in matches if len(products_of(m)) < len(m.nodes)}
        self.weight_of = {node: m["weight"] for m in matches for node in products_of(m)}
        self.observed = Observed(program, samples, self.weight_of, importance=settings.importance)
        self.propagation: Propagation | None = None
        if settings.methods.propagates:
            self.propagation = Propagation.of(program, samples, self.weight_of)
        self.blind = not samples
        self.made: dict[str, Split] = {}
        self.notes: dict[str, str] = {}
        self.unseen: set[str] = set()

    def run(self, progress: Progress) -> Plan:
        weights = dict.fromkeys(self.weight_of.values())
        if self.blind:
            for weight in weights:
                self._make(weight, None)
        while self.observed.left and not self.blind:
            if self._next() is not None:
                progress(f"calibrated {len(self.made)} of {len(weights)} weights")
                give_back()
        return self.plan()

    def plan(self) -> Plan:
        """What was made so far."""
        parts = {name: split.parts for name, split in self.made.items()}
        return Plan(self.weights, parts, self.notes)

    @property
    def weights(self) -> dict[str, QuantizedWeight]:
        return {name: split.weight for name, split in self.made.items()}

    def _next(self) -> fx.Node | None:
        """Go on to the next product; its weight, if that was calibrated there."""
        product = self.observed.next()
        if self.propagation is not None:
            self.propagation.look(product, self.observed)
        weight = self.weight_of[product]
        pending = {self.weight_of[n] for n in self.observed.left}
        if weight in pending:  # calibrated where it is read last
            return None
        self._quantize(weight)
        needed = [n for n, w in self.weight_of.items() if w in pending]
        self.observed.keep(needed)
        if self.propagation is not None:
            self.propagation.keep([*needed, *self.observed.left])
        return weight

    def _quantize(self, weight: fx.Node) -> None:
        self._place(weight, self._make(weight, self._seen(self._products(weight))))

    def _products(self, weight: fx.Node) -> list[fx.Node]:
        return [n for n, w in self.weight_of.items() if w is weight]

    def _place(self, weight: fx.Node, found: Split) -> None:
        """Later products see a weight quantized."""
        self.made[self.program.target_of(weight) or weight.name] = found
        stream, activations = self.observed.stream, self.at(weight).by_rows
        if activations == "none":
            stream.weight(weight, found.dense().to(val(weight).dtype))
            return
        for product in self._products(weight):
            stream.replace(product, partial(product_of, found, activations, None))

    def at(self, weight: fx.Node) -> Settings:
        """For one weight."""
        return self.settings.at(self.program, weight)

    def _seen(self, products: Sequence[fx.Node]) -> Seen | None:
        found = self.observed.of(products)
        if not sum(s.rows for s in found):
            return None
        moment = sum((s.moment for s in found[1:]), found[0].moment)
        return Seen(moment, max((s.spike for s in found), key=lambda row: float(row.abs().max())))

    def _make(self, weight: fx.Node, seen: Seen | None) -> Split:
        name = self.program.target_of(weight) or weight.name
        looked_up = weight in self.looked_up
        tensor, moved = self._served(weight, seen)
        found, note = made(tensor, self.at(weight), seen, looked_up=looked_up)
        notes = [moved, note, self._unweighted(weight)]
        if seen is None and not self.blind:
            self.unseen.add(name)
            notes.insert(0, f"`{name}` saw no calibration rows: it is rounded to nearest")
        self.made[name] = found
        if any(notes):
            self.notes[name] = "; ".join(filter(None, notes))
        return found

    def _served(self, weight: fx.Node, seen: Seen | None) -> tuple[Tensor, str]:
        """What is rounded: the weight, or what serves better behind quantized layers."""
        tensor = self.program.state[self.program.target_of(weight) or weight.name]
        if self.propagation is None or seen is None:
            return tensor, ""
        return self.propagation.served(tensor, self._products(weight))

    def _unweighted(self, weight: fx.Node) -> str:
        """Why rows count the same, where they should not."""
        unknown = self.observed.importance.unknown
        return next(filter(None, map(unknown.get, self._products(weight))), "")


def products_of(match: Match) -> list[fx.Node]:
    """Those of a match: look-ups of a tied head have no inputs to calibrate on."""
    return [n for n in match.nodes if n.target is torch.ops.aten.linear.default]


def product_of(
    found: Split,
    activations: str,
    static: Static | None,
    x: Tensor,
    _weight: Tensor,
    bias: Any = None,
) -> Tensor:
    """As the rule has it: columns in floats are none of the quantized input."""
    given = x
    for part in found.parts:
        if isinstance(part, Columns):
            given = x.index_fill(-1, part.places, 0.0)
    product = linear(given, found.weight, bias, activations, static)
    return product + remainder.product(found.parts, x)
