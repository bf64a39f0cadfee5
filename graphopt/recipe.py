"""One captured program through a recipe: options, passes, verification, report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.certify import certify
from graphopt.errors import CaptureError, GraphoptError, RecipeError
from graphopt.pipeline import Context, Judge, run_passes
from graphopt.presets import Recipe, resolve, to_recipe
from graphopt.program import Program, val
from graphopt.report.model import Certificate, Report
from graphopt.report.views import node_views
from graphopt.rewrite.passes import Pass
from graphopt.rewrite.rule import Numeric
from graphopt.source import source_line
from graphopt.verify.measure import compare, kernel_tolerance, worst
from graphopt.verify.replay import SEED
from graphopt.verify.thin import Thin, thinned
from graphopt.verify.whole import hash_inputs

TARGETS = ("torch", "inductor", "onnxruntime")

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
        target: one of `TARGETS`.
        providers: execution providers of ONNX Runtime, for that target; full or short names, which
            become full ones.
        measure: keep only rewrites that are not slower on this machine.
        strict: raise where something does not verify, instead of keeping the original there.
    """

    passes: Recipe = "exact"
    calibration: Iterable[Any] | None = None
    quality: Callable[[nn.Module], float] | None = None
    budget: float = 0.0
    target: str = "torch"
    providers: Sequence[str] | None = None
    strict: bool = False
    measure: bool = True
    progress: Callable[[str], None] = field(default=lambda _text: None)

    def __post_init__(self) -> None:
        if isinstance(self.calibration, Tensor | Mapping | str) or not isinstance(
            self.calibration, Iterable | None
        ):
            raise GraphoptError(
                f"calibration is a sequence of inputs, not {type(self.calibration).__name__}",
                where="calibration",
                fix="calibration=[first, second], each a tensor, tuple or dict",
            )
        if self.quality is not None and not callable(self.quality):
            raise GraphoptError(
                f"quality is a function of a module, not {type(self.quality).__name__}",
                where="quality",
                fix="quality=lambda module: accuracy(module)",
            )
        if self.target not in TARGETS:
            raise RecipeError(
                f"unknown target {self.target!r}",
                where="option target",
                fix=f"use one of {', '.join(TARGETS)}",
            )
        self._settle_providers()
        if not isinstance(self.budget, Real) or self.budget != self.budget:
            raise GraphoptError(f"the budget is a number, not {self.budget!r}", where="budget")

    def _settle_providers(self) -> None:
        """Full names of providers; refuse them for other targets, and those that are not here."""
        if self.target == "onnxruntime":
            from graphopt.emit.onnx_runtime import require
            from graphopt.emit.ort.providers import resolve_providers

            require("onnx", "onnxscript", "onnxruntime")
            if self.providers is not None:
                object.__setattr__(self, "providers", resolve_providers(self.providers))
        elif self.providers is not None:
            raise GraphoptError(
                f"providers have no meaning for target {self.target!r}",
                where="option providers",
                fix="leave providers out, or take target='onnxruntime'",
            )


def rewrite_program(
    program: Program,
    options: Options,
    eager: list[Any] | None = None,
    judge: Judge | None = None,
) -> tuple[Program, Report]:
    """Run the recipe; returns the rewritten program and the filled report.

    Args:
        eager: flat outputs of the original module on the captured inputs.
        judge: measures programs by ``options.quality``, for passes that search by it.
    """
    _check_layouts(program)
    passes = resolve(options.passes)
    report = _new_report(program, passes)
    start = time.perf_counter()
    captured = _certify_capture(program, eager, report)
    program = _conceded(program, passes)
    thin = thinned(program, passes, report.notes)
    judged = options.quality is not None
    context = Context.of(
        program, thin, strict=options.strict, measure=options.measure, judged=judged
    )
    context.samples = _bound(program, options.calibration)
    trials = _trials(program, context.samples[:CALIBRATION_SETS], thin)
    context.inputs += trials
    if trials:
        context.quantized.shown = range(len(context.inputs) - len(trials), len(context.inputs))
    context.report, context.progress, context.judge = report, options.progress, judge
    report.notes += context.skipped
    optimized = run_passes(program, passes, context)
    options.progress("verify the whole")
    report.verified = certify(program, optimized, context, name="whole program") and captured
    timed = context.stopwatch is not None and thin is None
    quantized = context.quantized.summary(program, optimized, report.missed, timed=timed)
    report.quantization = quantized
    report.graph_before, report.graph_after = node_views(program), node_views(optimized)
    report.seconds["optimize"] = time.perf_counter() - start
    return optimized, report


def _conceded(program: Program, passes: Sequence[Pass]) -> Program:
    """The program without what the options of passes give up."""
    twin = program.copy()
    for step in passes:
        step.concede(twin)
    return twin


def _check_layouts(program: Program) -> None:
    """Sparse tensors may stand inside a program, but nothing can be proved of sparse results."""
    values = (v for v in (*program.user_inputs(), *program.results()) if isinstance(v, fx.Node))
    for node in values:
        if isinstance(fake := val(node), Tensor) and fake.layout is not torch.strided:
            kind = "takes" if node.op == "placeholder" else "returns"
            raise CaptureError(
                f"{program.name} {kind} a tensor of layout {fake.layout}",
                where=source_line(node) or node.name,
                fix="take and return dense tensors: .to_dense()",
            )


def _new_report(program: Program, passes: Sequence[Pass]) -> Report:
    report = Report(program.name, recipe=to_recipe(passes), environment=environment())
    report.notes += getattr(program, "notes", [])
    return report


def environment() -> dict[str, str]:
    """Machine and versions, as a figure's footnote needs them."""
    return {
        "graphopt": version("graphopt"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu": _cpu(),
        "system": platform.system(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


@cache
def _cpu() -> str:
    """Its name where the system tells, and which vector instructions torch takes it for."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    found = [next(names, platform.processor()), torch.backends.cpu.get_cpu_capability()]
    if torch.cpu._is_amx_tile_supported():
        found.append("AMX")
    return ", ".join(filter(None, found))


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


def _bound(program: Program, batches: Iterable[Any] | None) -> list[list[Any]]:
    """Calibration batches as flat user inputs, each checked as a call would be."""
    if batches is None or program.call is None:
        return []
    from graphopt.emit.guards import CallBinder, InputGuard

    bind, guard = CallBinder(program), InputGuard(program)
    found = []
    for index, batch in enumerate(batches):
        args = () if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
        try:
            flat = bind(args, dict(batch) if isinstance(batch, Mapping) else {})
            guard(flat)
        except GraphoptError as error:
            raise GraphoptError(error.what, where=f"calibration[{index}]", fix=error.fix) from error
        found.append(flat)
    return found


def _trials(program: Program, samples: Sequence[list[Any]], thin: Thin | None) -> list[list[Any]]:
    """Calibration inputs that verification takes, which the model was seen to run on."""
    found = []
    for index, sample in enumerate(samples):
        flat = thin.inputs(sample) if thin else sample
        _run_once(thin.original if thin else program, flat, f"calibration[{index}]")
        found.append(flat)
    return found


def _run_once(program: Program, flat: list[Any], where: str) -> None:
    """Refuse inputs that the model itself fails on, such as an index out of range."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            program.run(flat)
    except Exception as error:
        raise GraphoptError(
            f"{program.name} fails on these inputs: {type(error).__name__}: {error!s:.200}",
            where=where,
            fix="leave them out, or correct their values",
        ) from error
