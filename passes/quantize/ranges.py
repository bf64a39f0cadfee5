"""Scale and zero point of what products are given, found on calibration inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.calibration import Stream
from graphopt.errors import GraphoptError
from graphopt.kernels.quantized import activation_ranges
from graphopt.kernels.quantized.remainder import Columns
from graphopt.kernels.quantized.split import Split
from graphopt.kernels.quantized.static import Static
from graphopt.passes.quantize.convolution import QuantizeConvolution
from graphopt.passes.quantize.linear import QuantizeLinear
from graphopt.passes.quantize.norms import changed
from graphopt.passes.quantize.observed import given_to
from graphopt.passes.quantize.plan import Plan, Progress, product_of, products_of, rounded
from graphopt.program import Program
from graphopt.rewrite import Match, arguments
from graphopt.source import source_line

Targets = Sequence[tuple[QuantizeLinear, Match]]


@dataclass(frozen=True)
class _Read:
    """A product whose weight is quantized."""

    node: fx.Node
    rule: QuantizeLinear
    match: Match

    @property
    def name(self) -> str:
        weight = self.match["weight"]
        return self.match.program.target_of(weight) or weight.name

    @property
    def is_linear(self) -> bool:
        return type(self.rule) is QuantizeLinear


class Ranges:
    """Runs samples through a program once more, its weights quantized as the plan has them.

    All products that read one value share its scale and its zero point, and each finds the ones
    before it with theirs. What rows of samples never reach has none.
    """

    def __init__(
        self,
        program: Program,
        targets: Targets,
        samples: Sequence[Sequence[Any]],
        plan: Plan,
        ranges: str | float,
    ) -> None:
        self.program, self.plan, self.ranges = program, plan, ranges
        order = {node: place for place, node in enumerate(program.graph.nodes)}
        self.reads = sorted(_reads(targets), key=lambda read: order[read.node])
        self.stream = Stream(program, samples, [read.node for read in self.reads])
        for node, value in changed(program, plan.norms).items():
            self.stream.weight(node, value)
        self.found: dict[fx.Node, Static | None] = {}
        self.weights = dict(plan.weights)
        self.known: dict[tuple[Any, ...], Static | None] = {}

    def run(self, progress: Progress) -> Plan:
        """The plan with what was found: for each weight, in the order of its products."""
        for count, read in enumerate(self.reads):
            self.stream.advance(read.node)
            if read.rule.settings.activations == "static":
                self.found[read.node] = self._find(read)
                progress(f"found the range of {count + 1} of {len(self.reads)} inputs")
            if read.is_linear:
                self._place(read)
        inputs = {read.name: self._inputs(read.match) for read in self.reads}
        return replace(self.plan, weights=self.weights, inputs=inputs)

    def _inputs(self, match: Match) -> list[Static | None]:
        return [self.found.get(node) for node in match.nodes]

    def _find(self, read: _Read) -> Static | None:
        given, apart = given_to(read.node), self._columns(read)
        key = (given, *apart.tolist())
        if not self.stream.is_computed(given):
            return None
        if key not in self.known:
            readers = [r for r in self.reads if given_to(r.node) is given]
            importance = sum(self._importance(r) for r in readers) if read.is_linear else None

            def samples() -> Iterator[Tensor]:
                values = self.stream.given(given)
                return (v.index_fill(-1, apart, 0) for v in values) if len(apart) else values

            try:
                self.known[key] = activation_ranges.find(samples, self.ranges, importance)
            except ValueError as error:
                raise GraphoptError(
                    f"{self.program.name}: {error} at `{read.node.name}`",
                    where=source_line(read.node) or read.node.name,
                    fix="leave those inputs out, or correct their values",
                ) from error
        return self.known[key]

    def _importance(self, read: _Read) -> Any:
        """Squares of the weights that each column of the input meets."""
        return self.program.state[read.name].float().square().sum(0) if read.is_linear else 0.0

    def _columns(self, read: _Read) -> Tensor:
        """Of the input, that are multiplied in floats."""
        parts = self.plan.remainders.get(read.name, ())
        places = [part.places for part in parts if isinstance(part, Columns)]
        return torch.cat(places) if places else torch.empty(0, dtype=torch.int64)

    def _place(self, read: _Read) -> None:
        """Later products see this one as it will be."""
        name, settings = read.name, read.rule.settings
        if name not in self.weights:
            weight = self.program.state[name]
            self.weights[name] = rounded(weight, settings.scheme, settings.methods)
        split = Split(self.weights[name], tuple(self.plan.remainders.get(name, ())))
        static = self.found.get(read.node)
        activations = settings.by_rows if static is None else "static"
        self.stream.replace(read.node, partial(product_of, split, activations, static))


def _reads(targets: Targets) -> Iterator[_Read]:
    for rule, match in targets:
        if type(rule) is QuantizeLinear:
            yield from (_Read(node, rule, match) for node in products_of(match))
        elif isinstance(rule, QuantizeConvolution) and rule.settings.activations == "static":
            whole = (n for n in match.nodes if arguments(n)["groups"] == 1)
            yield from (_Read(node, rule, match) for node in whole)
