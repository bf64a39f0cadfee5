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
from graphopt.passes.quantize.norms import TweakNorm
from graphopt.passes.quantize.observed import require_samples
from graphopt.passes.quantize.plan import Plan, Settings, calibrate
from graphopt.passes.quantize.ranges import Ranges
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
        tweaks = [TweakNorm(self.plan.norms)] if self.settings.methods.tweaks else []
        return [*self.products(), *tweaks]

    def products(self) -> Sequence[QuantizeLinear]:
        """Those that store weights."""
        kinds = (QuantizeLinear, QuantizeExperts, QuantizeConvolution, QuantizeEmbedding)
        formats = self.settings.each()
        return [kind(each, self.plan, self.scope) for kind in kinds for each in formats]

    def calibrated(
        self,
        program: Program,
        samples: Sequence[Sequence[Any]],
        progress: Callable[[str], None],
    ) -> Pass:
        plan = self._planned(program, samples, progress)
        if any(each.activations == "static" for each in self.settings.each()):
            targets = self.targets(program)
            if any(rule.settings.activations == "static" for rule, _ in targets):
                require_samples(samples, "activations='static'", self.name, "activations='dynamic'")
                plan = Ranges(program, targets, samples, plan, self.settings.ranges).run(progress)
        return replace(self, plan=plan)

    def _planned(
        self,
        program: Program,
        samples: Sequence[Sequence[Any]],
        progress: Callable[[str], None],
    ) -> Plan:
        """Weights by methods that calibrate; others are rounded when they are rewritten."""
        methods = self.settings.methods.calibrated
        if not (methods or self.settings.beside):
            return self.plan
        matches = self.matches(program)
        if matches and methods:
            asked = f"method {' and '.join(methods)}"
            require_samples(samples, asked, self.name, "method='rtn'")
        if not matches:
            return Plan()
        if self.settings.methods.by_blocks:
            return BlockCalibration(program, matches, samples, self.settings).run(progress)
        return calibrate(program, matches, samples, self.settings, progress)

    def matches(self, program: Program) -> list[Match]:
        """Products of matrices that will be rewritten."""
        return [m for rule, m in self.targets(program) if type(rule) is QuantizeLinear]

    def targets(self, program: Program) -> list[tuple[QuantizeLinear, Match]]:
        """All that will be rewritten, and by which rule."""
        found = ((rule, c.match) for rule in self.products() for c in rule.find(program))
        return [(rule, m) for rule, m in found if m is not None and rule.check(m) is None]
