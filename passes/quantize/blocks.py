"""Calibration block by block: codes and scales of a block's weights learned together.

Targets are the outputs of the float model. Inputs of a block are those that the quantized blocks
before it give, so that a block makes good what these lost (Li et al. 2021, "BRECQ"; Cheng et al.
2024, SignRound). Two streams run through the program for that, each with one block's values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from graphopt.calibration import Segment, Stream, segments
from graphopt.calibration.segment import widened
from graphopt.kernels.quantized.adaround import AdaRound
from graphopt.kernels.quantized.definition import quantized_rows
from graphopt.kernels.quantized.flexround import FlexRound
from graphopt.kernels.quantized.learnable import LearnableWeight
from graphopt.kernels.quantized.learned_scales import LearnedScales, can_learn
from graphopt.kernels.quantized.signround import LearnedRounding
from graphopt.kernels.quantized.split import Split
from graphopt.kernels.quantized.weight import QuantizedWeight
from graphopt.passes.quantize.learned import Forward, Learned, Reconstruction
from graphopt.passes.quantize.observed import Observed
from graphopt.passes.quantize.plan import Calibration, Plan, Progress, Settings
from graphopt.passes.quantize.propagation import Propagation
from graphopt.passes.quantize.tweaks import Tweaks
from graphopt.program import Program
from graphopt.rewrite import Match

ROUNDINGS: Mapping[str, Callable[[Tensor, QuantizedWeight], LearnableWeight]] = {
    "learned": LearnedRounding,
    "adaround": AdaRound,
    "flexround": FlexRound,
}
"""How codes are learned, by the name of the method."""


class BlockCalibration(Calibration):
    """Calibrates the weights of a block one after the other, then learns from all it gives."""

    def __init__(
        self,
        program: Program,
        matches: Sequence[Match],
        samples: Sequence[Sequence[Any]],
        settings: Settings,
    ) -> None:
        super().__init__(program, matches, samples, settings)
        self.segments = segments(program.graph, self.weight_of)
        outputs = [n for segment in self.segments for n in segment.outputs]
        self.observed = Observed(program, samples, self.weight_of, outputs, settings.importance)
        self.original = Stream(program, samples, [*self.weight_of, *outputs], outputs)
        if self.propagation is not None:
            self.propagation = Propagation(self.original)
        self.tweaks = Tweaks(program)

    def run(self, progress: Progress) -> Plan:
        devices = {t.device for t in self.program.state.values() if t.device.type == "cuda"}
        with torch.inference_mode(False), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            for index, segment in enumerate(self.segments):
                self._segment(segment)
                progress(f"learned {index + 1} of {len(self.segments)} blocks")
        return self.plan()

    def plan(self) -> Plan:
        """What was made so far."""
        return replace(super().plan(), norms=self.tweaks.found)

    def _segment(self, segment: Segment) -> None:
        stream = self.observed.stream
        start = stream.nodes.index(segment.nodes[0])
        stream.advance_to(start)
        stream.forget([n for done in self.segments for n in done.outputs])
        mark, before = stream.mark(), set(self.weights)
        while self.observed.left and self.observed.left[0] in segment.nodes:
            self._next()
        stream.rewind(mark)
        made = {n: self._name(n) for n in segment.reads if self._name(n) in self.weights}
        fresh = {n: self.made[name] for n, name in made.items() if name not in before}
        for weight, split in fresh.items():
            self._place(weight, split)
        self.original.advance_to(start + len(segment.nodes))
        rows = (list(self.original.given(n)) for n in segment.outputs)
        targets = list(zip(*rows, strict=True))
        if self.settings.methods.tuning:
            stored = {weight: split.weight for weight, split in fresh.items()}
            for weight, learned in self._learned(segment, stored, targets).items():
                self._place(weight, Split(learned))
        if self.settings.methods.tweaks:
            self._tweak(segment, targets)
        self.original.forget(segment.outputs)

    def _tweak(self, segment: Segment, targets: Sequence[Sequence[Any]]) -> None:
        """Norms of a part as they suit its weights."""
        if inside := self.tweaks.of(segment):
            forward = partial(self._forward, segment)
            found = self.tweaks.learn(inside, forward, targets, self.settings.steps)
            for node, value in found.items():
                self.observed.stream.weight(node, value)

    def _learned(
        self,
        segment: Segment,
        fresh: Mapping[fx.Node, QuantizedWeight],
        targets: Sequence[Sequence[Any]],
    ) -> dict[fx.Node, QuantizedWeight]:
        """Weights of a part as they give less error."""
        current = {w: stored for w, stored in fresh.items() if self._own(w, segment)}
        if not current:
            return {}
        forward = self._forward(segment, list(current))
        try:
            with torch.enable_grad():
                return self._reconstructed(current, forward, targets)
        except (RuntimeError, ValueError) as error:
            self._note(current, f"its block does not let it be learned: {error!s:.200}")
            return {}

    def _reconstructed(
        self,
        current: dict[fx.Node, QuantizedWeight],
        forward: Forward,
        targets: Sequence[Sequence[Any]],
    ) -> dict[fx.Node, QuantizedWeight]:
        """Codes first, then scales. SignRound leaves those of GPTQ as they are: moving many of them
        at once loses what it gained by choosing each for the others."""
        errors: list[Learned] = []
        scales = all(can_learn(stored.scheme) for stored in current.values())
        if self.settings.methods.learns_codes:
            learned = {w: self._rounding(w, stored) for w, stored in current.items()}
            errors.append(Reconstruction(forward, learned, targets, self.settings.steps).learn())
            if errors[-1].after < errors[-1].before:
                current = {w: rounding.stored() for w, rounding in learned.items()}
        if scales:
            tuned = {w: LearnedScales(stored) for w, stored in current.items()}
            errors.append(Reconstruction(forward, tuned, targets, self.settings.steps).learn())
            current = {w: ranges.stored() for w, ranges in tuned.items()}
        self._note(current, _told(errors[0].before, errors[-1].after))
        return current

    def _own(self, weight: fx.Node, segment: Segment) -> bool:
        """Whether a weight is learned with a part: it is read nowhere else, and rows were seen."""
        if self._name(weight) in self.unseen:
            return False
        if all(n in segment.nodes for n, w in self.weight_of.items() if w is weight):
            return True
        self._note([weight], "it is read in several blocks: it is not learned")
        return False

    def _rounding(self, weight: fx.Node, stored: QuantizedWeight) -> LearnableWeight:
        tensor = self.program.state[self._name(weight)].detach()
        return ROUNDINGS[self.settings.methods.tuning or ""](widened(tensor), stored)

    def _forward(self, segment: Segment, learned: Sequence[fx.Node]) -> Forward:
        """What a part gives on what the samples have for it here."""
        stream, reads = self.observed.stream, segment.reads
        held = [n for n in reads if not stream.is_computed(n) and n not in learned]
        shared = {n: widened(next(stream.given(n))) for n in held}
        each = [n for n in reads if stream.is_computed(n)]
        given = [
            dict(zip(each, row, strict=True))
            for row in zip(*(list(stream.given(n)) for n in each), strict=True)
        ]
        stands = {n: stream.stands[n] for n in segment.nodes if n in stream.stands}
        for node in segment.nodes:
            if self.weight_of.get(node) in learned:
                settings = self.at(self.weight_of[node])
                if settings.activations != "none":
                    stands[node] = partial(_product, settings.scheme.dtype)

        def run(index: int, weights: Mapping[fx.Node, Tensor]) -> list[Any]:
            return segment.run({**shared, **given[index], **weights}, stands)

        return run

    def _name(self, weight: fx.Node) -> str:
        return self.program.target_of(weight) or weight.name

    def _note(self, weights: Sequence[fx.Node] | Mapping[fx.Node, Any], text: str) -> None:
        for name in map(self._name, weights):
            self.notes[name] = "; ".join(filter(None, (self.notes.get(name), text)))


def _told(before: float, after: float) -> str:
    error = "error of its block on calibration inputs"
    if not after < before:
        return f"{error} {before:.3g}, which learning did not lower"
    return f"{error} {after:.3g}, {before:.3g} before it was learned"


def _product(dtype: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """With each row of x rounded to 8 bits, and the gradient passed straight through."""
    codes, scale = quantized_rows(x.detach().flatten(0, -2), dtype)
    off = (codes.to(scale.dtype) * scale).view(x.shape) - x.detach()
    return F.linear(x + off, weight, bias)
