"""What a pass that searches may try: passes on a program, one instead of the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from graphopt.program import Program
from graphopt.quantized_summary import Gathered, state_bytes
from graphopt.report.model import Report, Trade
from graphopt.rewrite.passes import Pass

if TYPE_CHECKING:
    from graphopt.pipeline import Context

RunStages = Callable[[Program, Pass, "Context"], Program]


@dataclass(frozen=True)
class Tried:
    """A pass on a program, with what the report would say of it; see `rewrite.passes.Attempt`."""

    program: Program
    context: Context
    quality: float | None

    @property
    def bytes(self) -> int:
        return state_bytes(self.program)

    def adopted(self, context: Context) -> Program:
        """The program, as if the pass had run with this context."""
        mine, made = context.report, self.context.report
        mine.applied += made.applied
        mine.missed += made.missed
        mine.passes += made.passes
        mine.notes += made.notes
        context.quantized.join(self.context.quantized)
        context.thin = self.context.thin
        return self.program


class PassTrials:
    """Tries passes on a program, one instead of the other; see `rewrite.passes.Trials`."""

    def __init__(
        self, program: Program, later: Sequence[Pass], context: Context, run: RunStages
    ) -> None:
        self.program, self.samples = program, context.samples
        self.trades: list[Trade] = []
        self._later = [step for step in later if not step.searches]
        self._context, self._run = context, run

    @property
    def least(self) -> float | None:
        judge = self._context.judge
        return None if judge is None else judge.least()

    def progress(self, text: str, /) -> None:
        self._context.progress(text)

    def attempt(self, step: Pass, *, judged: bool = False) -> Tried:
        context = _apart(self._context)
        program = self._run(self.program, step, context)
        judge = self._context.judge if judged else None
        if judge is None:
            return Tried(program, context, None)
        ended, after = program, _apart(context)
        for other in self._later:
            ended = self._run(ended, other, after)
        self.progress("quality")
        return Tried(program, context, judge(ended))

    def record(self, size: int, loss: float, quality: float | None, *, chosen: bool) -> None:
        self.trades.append(Trade(size, loss, quality, chosen))


def _apart(context: Context) -> Context:
    """The same, with a report, a thin copy and rows of quantized weights of its own."""
    thin = context.thin
    alone = None if thin is None else replace(thin, apart=set(thin.apart))
    quantized = Gathered(context.quantized.shown)
    return replace(context, report=Report(context.report.model), thin=alone, quantized=quantized)
