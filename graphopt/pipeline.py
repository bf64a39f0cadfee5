"""Running passes over a program: apply, verify, keep what is right and pays, explain the rest."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from graphopt.errors import IllegalRewriteError, VerificationError
from graphopt.program import Program
from graphopt.quantized_summary import Gathered, state_bytes
from graphopt.report.model import Applied, Certificate, MissedRewrite, PassSummary, Report
from graphopt.report.text import share_text
from graphopt.rewrite.driver import Key, Log, Rewrite, apply_rules
from graphopt.rewrite.passes import Pass
from graphopt.rewrite.rule import Missed, Numeric, Rule
from graphopt.room import give_back
from graphopt.searching import PassTrials, Tried
from graphopt.verify.replay import Replay, Verdict, excuse_cancelled
from graphopt.verify.thin import Thin, transferred
from graphopt.verify.timing import Stopwatch, pays
from graphopt.verify.trials import trial_inputs
from graphopt.verify.whole import hash_inputs

ROUNDS = 8
"""Times a pass is replayed after rewrites were taken back before it is given up."""

Progress = Callable[[str], None]


class Judge(Protocol):
    """The user's measure."""

    def least(self) -> float:
        """What it may fall to."""
        ...

    def __call__(self, program: Program) -> float: ...


@dataclass
class Context:
    """What every pass of one run shares.

    Attributes:
        strict: raise on the first rewrite that does not verify, instead of taking it back.
        judged: the user's own measure decides how far lossy rewrites may go together.
        measure: time rewrites and keep only those that pay.
        inputs: sets of flat user inputs; the first is the captured one.
        drawn: which of them are random.
        skipped: in words, inputs that the model itself refuses.
        samples: sets of flat user inputs to calibrate on.
        quantized: what is known of weights in few bits.
        judge: measures programs, for passes that choose among their options.
        thin: what stands in for the program in verification, where the program is too large.
    """

    inputs: list[list[Any]]
    drawn: range = range(0)
    strict: bool = False
    measure: bool = True
    judged: bool = False
    stopwatch: Stopwatch | None = None
    progress: Progress = lambda _text: None
    report: Report = field(default_factory=lambda: Report("model"))
    skipped: list[str] = field(default_factory=list)
    samples: Sequence[Sequence[Any]] = ()
    thin: Thin | None = None
    quantized: Gathered = field(default_factory=Gathered)
    judge: Judge | None = None

    @classmethod
    def of(cls, program: Program, thin: Thin | None = None, **options: Any) -> Context:
        """Inputs as captured, fresh values at sizes not seen at capture, and at sizes of 1."""
        inputs, skipped = trial_inputs(thin.original if thin else program)
        drawn = range(1, len(inputs))
        context = cls(inputs, drawn, skipped=skipped, thin=thin, **options)
        if context.measure:
            context.stopwatch = Stopwatch(train=not program.frozen)
        return context


@dataclass
class _Outcome:
    program: Program
    thin: Program | None
    log: Log
    verdicts: dict[Key, Verdict]
    rejected: dict[Key, Verdict]
    seconds: float


def run_passes(program: Program, passes: Sequence[Pass], context: Context) -> Program:
    """Apply the passes in order; fills ``context.report``; returns a new program."""
    for index, step in enumerate(passes):
        program = _run_step(program, step, passes[index + 1 :], context, index)
    return program


def _run_step(
    program: Program, step: Pass, later: Sequence[Pass], context: Context, index: int
) -> Program:
    if not step.searches:
        return run_stages(program, step, context)
    trials = PassTrials(program, later, context, run_stages)
    found = step.settled(trials)
    context.report.trades += trials.trades
    if index < len(context.report.recipe):
        context.report.recipe[index] = {found.step.name: found.step.options()}
    if isinstance(found.attempt, Tried):
        return found.attempt.adopted(context)
    return run_stages(program, found.step, context)


def run_stages(program: Program, step: Pass, context: Context) -> Program:
    """Apply one pass, stage by stage."""
    for stage in step.stages():
        context.progress(stage.name)
        learned = stage.calibrated(program, context.samples, context.progress)
        program = run_pass(program, learned, context)
        give_back()
    return program


def run_pass(program: Program, step: Pass, context: Context) -> Program:
    """Apply one pass; what fails or does not pay is taken back by running it again without."""
    start = time.perf_counter()
    outcome = _until_sound(program, step, context)
    _record(program, step, outcome, context, time.perf_counter() - start)
    if not outcome.log.rewrites:
        return program
    if context.thin is not None and outcome.thin is not None:
        context.thin.program = outcome.thin
    return outcome.program


def _until_sound(program: Program, step: Pass, context: Context) -> _Outcome:
    rejected: dict[Key, Verdict] = {}
    rules = list(step.rules())
    verify_seconds = 0.0
    for _ in range(ROUNDS):
        work, thin = program.copy(), None
        start = time.perf_counter()
        try:
            log = apply_rules(work, rules, rejected.keys())
            start = time.perf_counter()
            if context.thin is None:
                verdicts = _verify(program, log, context)
            else:
                thin, twins = context.thin.rewritten(step, rejected.keys(), log)
                judged = _verify(context.thin.program, twins, context)
                verdicts = transferred(log, twins, judged)
        except IllegalRewriteError as error:
            if context.strict:
                raise
            return _Outcome(program, None, _given_up(rules, error), {}, rejected, verify_seconds)
        verify_seconds += time.perf_counter() - start
        bad = {k: v for k, v in verdicts.items() if not v.ok or not pays(v.pace)}
        if not bad:
            return _Outcome(work, thin, log, verdicts, rejected, verify_seconds)
        if context.strict:
            _raise_first(bad)
        rejected |= bad
    return _Outcome(program, None, Log(missed=log.missed), {}, rejected, verify_seconds)


def _given_up(rules: Sequence[Rule], error: IllegalRewriteError) -> Log:
    """A pass whose rules do not settle is left out, and says so."""
    log = Log()
    log.missed[("", "")] = Missed(rules[0].name, error.what, stage="verify")
    return log


def _verify(program: Program, log: Log, context: Context) -> dict[Key, Verdict]:
    """Verdicts on every set of inputs; timing on the captured sizes only."""
    found: dict[Key, list[Verdict]] = {}
    if not log.rewrites:
        return {}
    for index, inputs in _sets_for(log, context):
        stopwatch = context.stopwatch if index == 0 else None
        for verdict in Replay(program, log, stopwatch).judge(inputs):
            found.setdefault(verdict.rewrite.key, []).append(verdict)
    for verdicts in found.values():
        excuse_cancelled(verdicts)
        for index, verdict in enumerate(verdicts):
            if index not in context.quantized.shown:
                verdict.energies = ()
    return {key: functools.reduce(Verdict.merge, verdicts) for key, verdicts in found.items()}


def _sets_for(log: Log, context: Context) -> list[tuple[int, list[Any]]]:
    """Sets of inputs that rewrites are tried on, with their numbers.

    What is exact is so on any values: of the calibration inputs it sees one. How much is lost is
    measured on all of them.
    """
    lossy = any(r.rule.numeric is Numeric.LOSSY for r in log.rewrites)
    left = () if lossy else context.quantized.shown[1:]
    return [(i, inputs) for i, inputs in enumerate(context.inputs) if i not in left]


def _raise_first(bad: dict[Key, Verdict]) -> None:
    wrong = [v for v in bad.values() if not v.ok]
    if wrong:
        raise VerificationError(
            f"{wrong[0].rewrite.rule.name} changes what the model computes: {failure(wrong[0])}",
            where=wrong[0].rewrite.source,
            fix="run without strict to keep the original there, and report the rule",
        )


def failure(verdict: Verdict) -> str:
    """Why a verdict is negative, in words with figures."""
    outputs, gradients = verdict.outputs, verdict.gradients
    if not outputs.ok:
        return f"{outputs.note} (relative error {outputs.rms:.2g}, allowed {outputs.bound:.2g})"
    if gradients is not None and not gradients.ok:
        return (
            f"gradients: {gradients.note} "
            f"(relative error {gradients.rms:.2g}, allowed {gradients.bound:.2g})"
        )
    if verdict.pace is not None and not pays(verdict.pace):
        old, new = verdict.pace
        return f"slower here: {new * 1e6:.0f} us instead of {old * 1e6:.0f} us"
    return "verified"


def _record(
    before: Program, step: Pass, outcome: _Outcome, context: Context, seconds: float
) -> None:
    report, rejected = context.report, outcome.rejected
    digest = hash_inputs([v for _, values in _sets_for(outcome.log, context) for v in values])
    for rewrite in outcome.log.rewrites:
        verdict = outcome.verdicts[rewrite.key]
        report.applied.append(_applied(step, rewrite, verdict, digest))
        if not context.quantized.take(rewrite, verdict) and rewrite.remark:
            share = share_text(verdict.share)
            report.notes.append(f"{rewrite.remark} ({share})" if share else rewrite.remark)
    for verdict in rejected.values():
        report.missed.append(_taken_back(step, verdict))
    for missed in outcome.log.missed.values():
        row = MissedRewrite(
            step.name,
            missed.rule,
            missed.reason,
            missed.node,
            missed.source,
            missed.option,
            missed.stage,
            missed.weights,
        )
        report.missed.append(row)
    slower = sum(v.ok for v in rejected.values())
    report.passes.append(
        PassSummary(
            name=step.name,
            options=step.options(),
            matched=len(outcome.log.rewrites) + len(rejected),
            kept=len(outcome.log.rewrites),
            slower=slower,
            rolled_back=len(rejected) - slower,
            nodes_before=_size(before),
            nodes_after=_size(outcome.program),
            seconds=seconds,
            verify_seconds=outcome.seconds,
            bytes_before=state_bytes(before),
            bytes_after=state_bytes(outcome.program),
        )
    )


def _applied(step: Pass, rewrite: Rewrite, verdict: Verdict, digest: str) -> Applied:
    gradients = verdict.gradients
    certificate = Certificate(
        rule=rewrite.rule.name,
        version=rewrite.rule.version,
        numeric=rewrite.rule.numeric.value,
        nodes=rewrite.removed,
        source=rewrite.source,
        inputs_hash=digest,
        error=verdict.outputs.rms,
        max_error=verdict.outputs.max,
        original_error=verdict.outputs.original,
        bound=verdict.outputs.bound,
        gradient_error=gradients.rms if gradients else None,
        gradient_bound=gradients.bound if gradients else None,
        runs=verdict.runs,
        notes=tuple(verdict.notes),
        gradient_share=verdict.share,
    )
    speedup = verdict.pace.old / verdict.pace.new if verdict.pace else None
    return Applied(
        step.name,
        rewrite.rule.name,
        rewrite.removed,
        rewrite.added,
        rewrite.source,
        certificate,
        speedup,
    )


def _taken_back(step: Pass, verdict: Verdict) -> MissedRewrite:
    stage = "profit" if verdict.ok else "verify"
    rewrite = verdict.rewrite
    doubt = "" if verdict.ok else rewrite.rule.doubt
    return MissedRewrite(
        step.name,
        rewrite.rule.name,
        "; ".join(filter(None, (failure(verdict), doubt))),
        rewrite.key[1][0],
        rewrite.source,
        "measure=False" if verdict.ok else rewrite.rule.lift,
        stage,
        rewrite.weights,
    )


def _size(program: Program) -> int:
    return sum(1 for n in program.graph.nodes if n.op not in ("placeholder", "output"))
