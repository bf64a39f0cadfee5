"""Whether what a target made of a program computes what the program does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from graphopt.program import Program
from graphopt.rewrite.rule import Numeric
from graphopt.verify.measure import Measure, worst
from graphopt.verify.trials import Lower, hold, trial_inputs
from graphopt.verify.unrounded import rounds, unrounded


def fault(
    reference: Program,
    program: Program,
    lower: Lower,
    *,
    tolerance: float = 0.0,
    ones: bool = False,
    failures: tuple[type[Exception], ...] = (),
) -> str | None:
    """What is wrong with a lowered program, in words; ``None`` where nothing is.

    It is held to float64 on the captured and on unseen sizes, with gradients where it trains.

    Args:
        reference: what it is compared with.
        lower: makes the graph executable.
        tolerance: relative RMS that outputs may be off by, of what rounds on the way.
        ones: also at sizes of 1.
        failures: what is raised where code cannot be made or run.
    """
    sets, _ = trial_inputs(reference, ones=ones)
    try:
        found = [_measure(reference, program, inputs, lower, tolerance) for inputs in sets]
    except failures as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"cannot be made: {' '.join(said[:2])}"
    off = next((m for m in found if not m.ok), None)
    return None if off is None else f"is wrong: {off.note}, error {off.rms:.2g}"


def _measure(
    reference: Program, program: Program, inputs: Sequence[Any], lower: Lower, tolerance: float
) -> Measure:
    """Within the tolerance, or within a multiple of the reference's own error.

    A program that rounds activations and is held to itself may differ from itself by as much as it
    does from one that does not round them: see `unrounded`.
    """
    held = partial(hold, reference, program, inputs, lower=lower)
    numeric = Numeric.LOSSY if tolerance else Numeric.REASSOCIATED
    found = _worst(held(numeric, tolerance))
    if not found.ok and tolerance:
        found = _worst(held(Numeric.REASSOCIATED))
    if not found.ok and reference is program and rounds(program.graph):
        found = _worst(held(Numeric.REASSOCIATED, reference=unrounded(program)))
    return found


def _worst(found: tuple[Measure, Measure | None]) -> Measure:
    return worst([m for m in found if m is not None])
