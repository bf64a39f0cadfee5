"""What is known of a quantized model, gathered as passes run and are verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from graphopt.program import Program, tensor_bytes
from graphopt.quantized_layers import float_weights, in_order, layer_of, new_state
from graphopt.quantized_outputs import Outputs
from graphopt.report.model import MissedRewrite
from graphopt.report.quantized import OutputFidelity, Quantization, QuantizedLayer
from graphopt.rewrite.driver import Rewrite
from graphopt.verify.replay import Verdict
from graphopt.verify.timing import Pace, glance

WHOLE = 1.0
"""Seconds for which a quantized program and its original are timed."""


@dataclass
class Gathered:
    """Rows of the report so far.

    Attributes:
        shown: places, among the sets of inputs of verification, of those that figures are of: all
            of calibration, or else the captured one.
        held: names of the placeholders that quantized weights are stored as.
    """

    shown: range = range(1)
    layers: list[QuantizedLayer] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    outputs: tuple[OutputFidelity, ...] = ()

    def take(self, rewrite: Rewrite, verdict: Verdict) -> bool:
        """Note a rewrite that stores a weight in few bits; False for every other."""
        layer = layer_of(rewrite, verdict)
        if layer is not None:
            self.layers.append(layer)
            self.held |= new_state(rewrite)
        return layer is not None

    def join(self, other: Gathered) -> None:
        """Add the rows that another gathered."""
        self.layers += other.layers
        self.held |= other.held

    def summary(
        self,
        original: Program,
        optimized: Program,
        missed: Sequence[MissedRewrite],
        *,
        timed: bool,
    ) -> Quantization | None:
        """All of it; ``None`` where there was nothing to quantize."""
        if not self.layers and not any(row.weights for row in missed):
            return None
        pace = _pace(original, optimized) if timed and self.layers else None
        return Quantization(
            layers=in_order(self.layers, optimized),
            floats=tuple(float_weights(original, optimized, missed, self.held)),
            outputs=self.outputs,
            inputs="captured" if self.shown == range(1) else "calibration",
            bytes_before=state_bytes(original),
            bytes_after=state_bytes(optimized),
            seconds_before=pace.old if pace else None,
            seconds_after=pace.new if pace else None,
        )

    def seen(self, index: int, outputs: Outputs) -> Outputs | None:
        """What gathers the outputs on one set of inputs, if anything does."""
        return outputs if self.layers and index in self.shown else None


def state_bytes(program: Program) -> int:
    """Bytes of distinct tensors the program holds."""
    return tensor_bytes(program.state.values())


def _pace(original: Program, optimized: Program) -> Pace:
    inputs = original.example_inputs
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return glance(lambda: original.run(inputs), lambda: optimized.run(inputs), WHOLE)
