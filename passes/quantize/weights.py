"""The last stage of QuantizeMatmul: weights that are stored in few bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graphopt.passes.quantize.blocks import BlockCalibration
from graphopt.passes.quantize.convolution import QuantizeConvolution
from graphopt.passes.quantize.experts import QuantizeExperts
from graphopt.passes.quantize.linear import QuantizeLinear
from graphopt.passes.quantize.lookups import QuantizeEmbedding
from graphopt.passes.quantize.names import USUAL, Scope
from graphopt.passes.quantize.observed import require_samples
from graphopt.passes.quantize.plan import Plan, Settings, calibrate
from graphopt.passes.quantize.stage import Stage
from graphopt.program import Program
from graphopt.rewrite import Match, Pass, Rule


@dataclass(frozen=True)
class QuantizeWeights(Stage):
    """Products on weights of the model, these quantized as a plan has them.

    Attributes:
        plan: what calibration made of weights.
    """

    settings: Settings
    scope: Scope = USUAL
    plan: Plan = field(default_factory=Plan)

    def rules(self) -> Sequence[Rule]:
        kinds = (QuantizeLinear, QuantizeExperts, QuantizeConvolution, QuantizeEmbedding)
        return [kind(self.settings, self.plan, self.scope) for kind in kinds]

    def calibrated(
        self,
        program: Program,
        samples: Sequence[Sequence[Any]],
        progress: Callable[[str], None],
    ) -> Pass:
        methods = self.settings.methods.calibrated
        if not (methods or self.settings.beside):
            return self
        matches = self.matches(program)
        if matches and methods:
            require_samples(samples, methods, self.name)
        if not matches:
            return replace(self, plan=Plan())
        if self.settings.methods.tuning:
            blocks = BlockCalibration(program, matches, samples, self.settings)
            return replace(self, plan=blocks.run(progress))
        return replace(self, plan=calibrate(program, matches, samples, self.settings, progress))

    def matches(self, program: Program) -> list[Match]:
        """What the rule will rewrite."""
        rule = QuantizeLinear(self.settings, self.plan, self.scope)
        found = (candidate.match for candidate in rule.find(program))
        return [m for m in found if m is not None and rule.check(m) is None]
