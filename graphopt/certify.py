"""Whether an optimized program is the original, as a whole: what passes did to it together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graphopt.program import Program
from graphopt.quantized_outputs import Outputs
from graphopt.report.model import Certificate
from graphopt.rewrite.rule import Numeric
from graphopt.room import give_back
from graphopt.verify.filtered import full_program
from graphopt.verify.inputs import cached_inputs
from graphopt.verify.trials import hold
from graphopt.verify.whole import hash_inputs

if TYPE_CHECKING:
    from graphopt.pipeline import Context

LOSS = 2.0
"""What outputs may be off by, times what lossy rewrites come to. Errors that do not know of each
other add up as the root of the sum of their squares."""
DRAWN = (
    "positions of a cache were drawn: what attends to them loses any amount to rounding, and each "
    "lossy rewrite is held to its bound by itself alone"
)


def certify(original: Program, optimized: Program, context: Context, *, name: str) -> bool:
    """Whether the whole holds to float64 on every set of inputs; adds the certificates.

    Gradients that operators filter are compared in full: what filters may leave out is stated, and
    held to, where they stand. Where lossy rewrites were applied, outputs may be off by `LOSS` times
    what these were measured to come to, and by what one of them may be; but not by more than they
    are large, unless the user judges that. What attends to positions of a cache that were drawn
    loses any amount to rounding: there, lossy rewrites are held to their bounds one by one alone.
    """
    if context.thin is not None:
        original, optimized = context.thin.original, context.thin.program
    optimized = full_program(optimized)
    tolerance = _loss(context.report.losses, math.inf if context.judged else 1.0)
    sound, outputs = True, Outputs(original)
    attends = tolerance is not None and bool(cached_inputs(original))
    for index, inputs in enumerate(context.inputs):
        seen = context.quantized.seen(index, outputs)
        drawn = attends and index in context.drawn
        allowed = math.inf if drawn else tolerance
        certificate, ok = _certify_once(original, optimized, inputs, allowed, name, seen)
        give_back()
        if drawn:
            certificate = replace(certificate, notes=(*certificate.notes, DRAWN))
        context.report.whole.append(certificate)
        sound &= ok
    context.quantized.outputs = outputs.rows
    return sound


def _loss(lossy: Sequence[Certificate], most: float) -> float | None:
    """What outputs may be off by, relative; ``None`` where nothing lossy was applied."""
    if not lossy:
        return None
    total = math.hypot(*(c.error for c in lossy))
    return min(most, max(LOSS * total, *(c.bound for c in lossy)))


def _certify_once(
    original: Program,
    optimized: Program,
    inputs: list[Any],
    tolerance: float | None,
    name: str,
    seen: Outputs | None,
) -> tuple[Certificate, bool]:
    numeric = Numeric.REASSOCIATED if tolerance is None else Numeric.LOSSY
    outputs, gradients = hold(original, optimized, inputs, numeric, tolerance or 0.0, seen=seen)
    ok = outputs.ok and (gradients is None or gradients.ok)
    notes = tuple(m.note for m in (outputs, gradients) if m is not None and m.note)
    certificate = Certificate(
        rule=name,
        version=1,
        numeric=numeric.value,
        nodes=(),
        source=None,
        inputs_hash=hash_inputs(inputs),
        error=outputs.rms,
        max_error=outputs.max,
        original_error=outputs.original,
        bound=outputs.bound,
        gradient_error=gradients.rms if gradients else None,
        gradient_bound=gradients.bound if gradients else None,
        runs=1,
        notes=notes,
    )
    return certificate, ok
