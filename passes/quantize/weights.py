"""The last stage of QuantizeMatmul: weights that are stored in few bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.passes.quantize.linear import QuantizeLinear
from graphopt.passes.quantize.plan import Plan, Settings, calibrate
from graphopt.program import Program
from graphopt.rewrite import Match, Pass, Rule


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Products on weights of the model, these quantized as a plan has them.

    Attributes:
        given: the pass that this is a stage of, and whose options the report shows.
        plan: what calibration made of weights.
    """

    given: Pass
    settings: Settings
    head: bool = False
    plan: Plan = field(default_factory=Plan)

    @property
    def name(self) -> str:
        return self.given.name

    def options(self) -> dict[str, Any]:
        return self.given.options()

    def rules(self) -> Sequence[Rule]:
        return (self._rule(),)

    def _rule(self) -> QuantizeLinear:
        return QuantizeLinear(self.settings, self.plan, head=self.head)

    def calibrated(
        self,
        program: Program,
        samples: Sequence[Sequence[Any]],
        progress: Callable[[str], None],
    ) -> Pass:
        methods = self.settings.methods.calibrated
        if not methods:
            return self
        matches = self.matches(program)
        if matches and not samples:
            raise GraphoptError(
                f"method {' and '.join(methods)} learns from calibration inputs; there are none",
                where=self.name,
                fix="calibration=[inputs, ...] with example_inputs, on the command line "
                "--calibration FILE; or method='rtn', which needs none",
            )
        plan = calibrate(program, matches, samples, self.settings, progress) if matches else Plan()
        return replace(self, plan=plan)

    def matches(self, program: Program) -> list[Match]:
        """What the rule will rewrite."""
        rule = self._rule()
        found = (candidate.match for candidate in rule.find(program))
        return [m for m in found if m is not None and rule.check(m) is None]
