"""A recipe on an ONNX file: every pass compared with the original, timed, kept or taken back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from graphopt.emit.onnx_quantized.emitter import MICROSOFT
from graphopt.errors import GraphoptError, VerificationError
from graphopt.onnx_files.document import (
    graphs_of,
    node_count,
    onnx_proto,
    session_of,
    stored_bytes,
)
from graphopt.onnx_files.examine import Examiner
from graphopt.onnx_files.steps import Change, OnnxPass, Outcome, Surroundings
from graphopt.onnx_files.values import run
from graphopt.report.model import Applied, Certificate, MissedRewrite, PassSummary
from graphopt.report.quantized import QuantizedLayer
from graphopt.report.text import seconds_text
from graphopt.rewrite.rule import Numeric
from graphopt.verify.measure import EXACT, Measure
from graphopt.verify.timing import Pace, interleaved, pays

_AT_OUTPUTS = "seen at the outputs of the model, with all rewrites of the pass"
BUDGET = 0.5
"""Seconds that two forms of a file are timed for, about."""
VERSION = 1


@dataclass
class Result:
    """What a recipe came to.

    Attributes:
        model: the rewritten model.
        allowed: relative RMS error that its lossy rewrites come to.
    """

    model: Any
    applied: list[Applied] = field(default_factory=list)
    missed: list[MissedRewrite] = field(default_factory=list)
    passes: list[PassSummary] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layers: list[QuantizedLayer] = field(default_factory=list)
    allowed: float = 0.0


@dataclass
class Pipeline:
    """Runs passes on a model, one after the other.

    Attributes:
        strict: raise where a rewrite does not verify.
    """

    examiner: Examiner
    around: Surroundings
    strict: bool = False

    def run(self, model: Any, passes: Sequence[OnnxPass]) -> Result:
        """The model after all passes.

        Raises:
            VerificationError: with ``strict``, names the pass and its rewrites.
        """
        result = Result(model)
        for step in passes:
            self.around.progress(step.name)
            self._step(step, result)
        return result

    def _step(self, step: OnnxPass, result: Result) -> None:
        start, before = time.perf_counter(), result.model
        tried = _Tried(step, self, before, result.allowed)
        outcome, found = tried.held()
        kept, slower = outcome.changes, 0
        pace = self._pace(step, before, tried.model) if kept else None
        if pace is not None and not pays(pace):
            found, pace = self._other_form(step, before, tried, found, pace)
        if not pays(pace) and pace is not None:
            figures = f"{seconds_text(pace.new)} beside {seconds_text(pace.old)} in ONNX Runtime"
            reason = f"the file is slower with it, {figures}"
            result.missed += [step.missed(r, reason, stage="profit") for r in _rules(kept)]
            kept, slower = [], len(kept)
        if kept:
            result.model = tried.model
            result.allowed = max(result.allowed, outcome.allowed)
        proof = partial(self.examiner.certificate, found, version=VERSION)
        speedup = None if pace is None else pace.old / max(pace.new, 1e-9)
        result.applied += [_applied(step, c, proof, speedup) for c in kept]
        result.missed += [*outcome.missed, *tried.failed]
        result.notes += outcome.notes
        result.layers += outcome.layers
        result.passes.append(
            PassSummary(
                step.name,
                dict(step.options()),
                matched=len(kept) + slower + len(tried.failed),
                kept=len(kept),
                slower=slower,
                rolled_back=len(tried.failed),
                nodes_before=node_count(before),
                nodes_after=node_count(result.model),
                seconds=time.perf_counter() - start,
                verify_seconds=tried.seconds,
                bytes_before=stored_bytes(before),
                bytes_after=stored_bytes(result.model),
            )
        )

    def _other_form(
        self, step: OnnxPass, before: Any, tried: _Tried, found: Measure, pace: Pace
    ) -> tuple[Measure, Pace]:
        """The other form of a pass that is slower, in the place of the first where that pays."""
        other = step.alternative(tried.model)
        if other is None:
            return found, pace
        try:
            measured = tried.examined(other, tried.allowed)
        except VerificationError:
            return found, pace
        second = self._pace(step, before, other)
        if second is None or not pays(second):
            return found, pace
        tried.model = other
        return measured, second

    def _pace(self, step: OnnxPass, before: Any, after: Any) -> Pace | None:
        if not (step.timed and self.around.measure):
            return None
        return pace_of(before, after, self.around)


def pace_of(before: Any, after: Any, around: Surroundings) -> Pace:
    """Both models in turn in ONNX Runtime, on the first inputs."""
    calls = [
        partial(run, session_of(model, external=around.external), around.feeds.first)
        for model in (before, after)
    ]
    for call in calls:
        call()
    return interleaved(calls[0], calls[1], BUDGET)


class _Tried:
    """A pass tried on a model; what does not verify is looked for and left out."""

    def __init__(self, step: OnnxPass, owner: Pipeline, before: Any, allowed: float) -> None:
        self.step, self.owner, self.before, self.allowed = step, owner, before, allowed
        self.model = before
        self.failed: list[MissedRewrite] = []
        self.rules: dict[str, str] = {}
        self.seconds = 0.0

    def held(self) -> tuple[Outcome, Measure]:
        """The pass with all of its rewrites that verify."""
        outcome, model = self._apply(None)
        if not outcome.changes:
            return outcome, EXACT
        try:
            found = self._examined(model, outcome)
        except VerificationError as error:
            if self.owner.strict:
                raise _failure(self.step, outcome, error) from error
            return self._without_failures(outcome, error)
        self.model = model
        return outcome, found

    def _without_failures(
        self, whole: Outcome, error: VerificationError
    ) -> tuple[Outcome, Measure]:
        """Rewrites are tried in halves, so that a few that fail cost few runs."""
        self.rules = {change.key: change.rule for change in whole.changes}
        kept = self._good(list(self.rules), [], str(error.what))
        if not kept:
            return Outcome(missed=whole.missed, notes=whole.notes), EXACT
        outcome, model = self._apply(kept)
        found = self._examined(model, outcome)
        self.model = model
        return replace(outcome, missed=whole.missed), found

    def _good(self, keys: list[str], kept: list[str], reason: str) -> list[str]:
        """``kept`` with those of ``keys`` that hold besides; the others are noted as failed."""
        if len(keys) > 1:
            middle = len(keys) // 2
            for part in (keys[:middle], keys[middle:]):
                kept = self._grown(part, kept)
            return kept
        rule = self.rules[keys[0]]
        self.failed.append(self.step.missed(rule, reason, keys[0], stage="verify"))
        return kept

    def _grown(self, keys: list[str], kept: list[str]) -> list[str]:
        outcome, model = self._apply([*kept, *keys])
        try:
            self._examined(model, outcome)
        except VerificationError as error:
            return self._good(keys, kept, str(error.what))
        return [*kept, *keys]

    def _apply(self, keys: list[str] | None) -> tuple[Outcome, Any]:
        model = self.before.clone()
        allowed = None if keys is None else set(keys)
        outcome = self.step.apply(
            model, self.owner.around, lambda key: allowed is None or key in allowed
        )
        return outcome, model if outcome.model is None else outcome.model

    def _examined(self, model: Any, outcome: Outcome) -> Measure:
        return self.examined(model, max(self.allowed, outcome.allowed))

    def examined(self, model: Any, allowed: float) -> Measure:
        """A model held to the original.

        Raises:
            VerificationError: it does not compute the same.
        """
        start = time.perf_counter()
        try:
            check_model(model, self.before)
            return self.owner.examiner.examine(model, allowed)
        finally:
            self.seconds += time.perf_counter() - start


def check_model(model: Any, before: Any) -> None:
    """Whether it has the inputs and outputs that it had, and is one that ONNX knows.

    Raises:
        VerificationError: says what is wrong with it.
    """
    import onnx

    if _signature(model) != _signature(before):
        raise VerificationError("its inputs or outputs are others")
    proto = onnx_proto(model)
    if proto.ByteSize() > _CHECKED:
        return
    try:
        onnx.checker.check_model(_without_own(proto))
    except onnx.checker.ValidationError as error:
        try:
            onnx.checker.check_model(_without_own(onnx_proto(before)))
        except onnx.checker.ValidationError:
            return  # nothing new: ONNX Runtime runs what the checker refuses
        raise VerificationError(f"it is no ONNX model: {str(error).splitlines()[0]}") from error


def _without_own(proto: Any) -> Any:
    """The same with ONNX Runtime's own operators, which it has in ONNX's domain, in its own: those
    onnx does not check."""
    for graph in graphs_of(proto):
        for node in graph.node:
            if node.op_type in _OWN and not node.domain:
                node.domain = MICROSOFT
    if all(entry.domain != MICROSOFT for entry in proto.opset_import):
        proto.opset_import.add(domain=MICROSOFT, version=1)
    return proto


_OWN = frozenset({"SimplifiedLayerNormalization"})
_CHECKED = 1 << 30
"""Bytes of a model that onnx's checker is asked about, at most: protobuf ends at twice that."""


def _signature(model: Any) -> list[tuple[str, str, bool]]:
    values = [*model.graph.inputs, *model.graph.outputs]
    return [(str(v.name), str(v.type), v.is_initializer()) for v in values]


def _rules(changes: Sequence[Change]) -> list[str]:
    return list(dict.fromkeys(change.rule for change in changes))


def _applied(
    step: OnnxPass, change: Change, proof: Callable[..., Certificate], speedup: float | None
) -> Applied:
    exact = Numeric.BITWISE if change.bitwise else Numeric.REASSOCIATED
    numeric = Numeric.LOSSY if step.lossy else exact
    made = replace(proof(rule=change.rule, numeric=numeric.value), nodes=change.removed)
    if change.error is not None:
        made = replace(
            made, error=change.error, max_error=change.error, bound=change.bound, notes=()
        )
    elif made.bound:
        made = replace(made, notes=(*made.notes, _AT_OUTPUTS))
    if change.assumes:
        made = replace(made, notes=(change.assumes, *made.notes))
    return Applied(step.name, change.rule, change.removed, change.added, None, made, speedup)


def _failure(step: OnnxPass, outcome: Outcome, error: GraphoptError) -> VerificationError:
    rules = ", ".join(_rules(outcome.changes)[:5])
    return VerificationError(
        f"{step.name} ({rules}) does not verify: {error.what}",
        fix="leave --strict (in Python, strict=True) out: what fails is then taken back",
    )
