"""Handing the rewritten graph on to Inductor, and checking what comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from graphopt.emit.module import OptimizedModule
from graphopt.errors import VerificationError
from graphopt.program import Program
from graphopt.rewrite.rule import Numeric
from graphopt.verify.measure import Measure, compare, worst
from graphopt.verify.whole import run_program

if TYPE_CHECKING:
    from graphopt.recipe import Options


def to_inductor(module: OptimizedModule, original: Program, options: Options) -> None:
    """Compile the module's graph with Inductor; keep it only if its outputs hold to float64."""
    plain = module._graph.code
    options.progress("inductor")
    dynamic = True if original.range_constraints else None
    module._graph.code = torch.compile(plain, dynamic=dynamic, fullgraph=True)
    found = _check(module, original)
    if found.ok:
        return
    module._graph.code = plain
    message = f"Inductor's code for {original.name} is wrong: {found.note}, error {found.rms:.2g}"
    if options.strict:
        raise VerificationError(message, fix="use target='torch'")
    module.report.notes.append(f"{message}; the torch target was kept")


def _check(module: OptimizedModule, original: Program) -> Measure:
    inputs = list(original.example_inputs)
    old = run_program(original, inputs, wide=False, grad=False)
    exact = run_program(original, inputs, wide=True, grad=False)
    with torch.no_grad():
        new = module._graph(*module._arguments(inputs))
    rows = [
        compare(o, n, e, Numeric.REASSOCIATED)
        for o, n, e in zip(old.outputs, new, exact.outputs, strict=True)
    ]
    return worst(rows)
