"""One captured program through a recipe: options, passes, verification, report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from graphopt.pipeline import Context, certify, run_passes
from graphopt.presets import Recipe, resolve, to_recipe
from graphopt.program import Program
from graphopt.report.model import Certificate, Report
from graphopt.report.views import node_views
from graphopt.rewrite.passes import Pass
from graphopt.rewrite.rule import Numeric
from graphopt.verify.measure import compare, kernel_tolerance, worst
from graphopt.verify.replay import SEED
from graphopt.verify.whole import hash_inputs

CALIBRATION_SETS = 4
"""Calibration inputs that also serve verification; more would only cost time."""


@dataclass(frozen=True)
class Options:
    """How to optimize one captured program.

    Attributes:
        passes: preset name, recipe file, or passes.
        calibration: further inputs (tensor, tuple or dict, as the model takes them).
        quality: ``quality(module) -> float``, higher is better.
        budget: how far ``quality`` may fall, absolute.
        measure: keep only rewrites that are not slower on this machine.
        strict: raise where something does not verify, instead of keeping the original there.
    """

    passes: Recipe = "exact"
    calibration: Iterable[Any] | None = None
    quality: Callable[[nn.Module], float] | None = None
    budget: float = 0.0
    target: str = "torch"
    strict: bool = False
    measure: bool = True
    progress: Callable[[str], None] = field(default=lambda _text: None)


def rewrite_program(
    program: Program, options: Options, eager: list[Any] | None = None
) -> tuple[Program, Report]:
    """Run the recipe; returns the rewritten program and the filled report."""
    passes = resolve(options.passes)
    report = _new_report(program, passes)
    context = Context.of(program, strict=options.strict, measure=options.measure)
    context.inputs += _calibration_inputs(program, options.calibration)
    context.report, context.progress = report, options.progress
    report.notes += context.skipped
    start = time.perf_counter()
    captured = _certify_capture(program, eager, report)
    optimized = run_passes(program, passes, context)
    options.progress("verify the whole")
    report.verified = certify(program, optimized, context, name="whole program") and captured
    report.graph_before, report.graph_after = node_views(program), node_views(optimized)
    report.seconds["optimize"] = time.perf_counter() - start
    return optimized, report


def _new_report(program: Program, passes: Sequence[Pass]) -> Report:
    report = Report(program.name, recipe=to_recipe(passes), environment=environment())
    report.notes += getattr(program, "notes", [])
    return report


def environment() -> dict[str, str]:
    """Machine and versions, as a figure's footnote needs them."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _certify_capture(program: Program, eager: list[Any] | None, report: Report) -> bool:
    """Whether the captured graph gives what the module gave."""
    if eager is None:
        return True
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        results = program.run(program.example_inputs)[-len(eager) or len(program.outputs) :]
    rows = [
        compare(e, r, e, Numeric.LOSSY, tolerance=kernel_tolerance(e))
        for e, r in zip(eager, results, strict=True)
    ]
    found = worst(rows)
    report.whole.append(_capture_certificate(found, program))
    return found.ok


def _capture_certificate(found: Any, program: Program) -> Certificate:
    return Certificate(
        rule="capture",
        version=1,
        numeric=Numeric.REASSOCIATED.value,
        nodes=(),
        source=None,
        inputs_hash=hash_inputs(program.example_inputs),
        error=found.rms,
        max_error=found.max,
        original_error=0.0,
        bound=found.bound,
        runs=1,
        notes=(found.note,) if found.note else (),
    )


def _calibration_inputs(program: Program, batches: Iterable[Any] | None) -> list[list[Any]]:
    """Calibration batches as flat user inputs."""
    if batches is None or program.call is None:
        return []
    from graphopt.emit.guards import CallBinder

    bind = CallBinder(program)
    found = []
    for batch in islice(batches, CALIBRATION_SETS):
        if isinstance(batch, Mapping):
            found.append(bind((), dict(batch)))
        else:
            found.append(bind(batch if isinstance(batch, tuple) else (batch,), {}))
    return found
