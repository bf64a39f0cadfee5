"""`graphopt.compile` and `graphopt.explain`: capture, rewrite, verify, emit."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.capture import capture
from graphopt.emit.module import OptimizedModule
from graphopt.errors import GraphoptError, VerificationError
from graphopt.pipeline import Context, certify, run_passes
from graphopt.presets import Recipe, resolve, to_recipe
from graphopt.program import Program
from graphopt.report.model import Certificate, Report
from graphopt.rewrite.passes import Pass
from graphopt.rewrite.rule import Numeric
from graphopt.verify.measure import compare, worst
from graphopt.verify.replay import SEED

TARGETS = ("torch", "inductor")
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


def compile(
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    passes: Recipe = "exact",
    calibration: Iterable[Any] | None = None,
    quality: Callable[[nn.Module], float] | None = None,
    budget: float = 0.0,
    target: str = "torch",
    providers: Sequence[str] | None = None,
    strict: bool = False,
    measure: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Any:
    """Optimize a model; returns an ``nn.Module`` that is called like the original.

    With ``example_inputs`` or ``example_kwargs`` the whole graph is captured ahead of time. Without,
    the model is compiled through Dynamo as it is called, so graph breaks, training loops and
    ``generate()`` keep working.

    Args:
        dynamic_shapes: axes that must stay dynamic, as `torch.export.export` takes them.
        passes: ``"exact"`` (default), another preset, a YAML recipe, or a sequence of passes.
        calibration: inputs the result is verified on besides ``example_inputs``.
        quality: ``quality(module) -> float``, higher is better; checked against ``budget``.
        budget: how far ``quality`` may fall below the original's, absolute.
        target: ``"torch"``, or ``"inductor"`` to hand the rewritten graph on to Inductor.
        providers: ONNX Runtime execution providers; only for the target ``"onnxruntime"``.
        strict: raise `VerificationError` instead of keeping the original where a rewrite fails.
        measure: keep only rewrites that are not slower on this machine.
        progress: called with a line of text as the work proceeds.

    Raises:
        CaptureError: the model cannot be captured.
        VerificationError: the result is wrong (always for the whole, with ``strict`` for any part).
    """
    _check_target(target, providers)
    options = Options(
        passes, calibration, quality, budget, target, strict, measure, progress or (lambda _t: None)
    )
    if example_inputs is None and example_kwargs is None:
        from graphopt.backend import compile_dynamic

        return compile_dynamic(model, options)
    program, eager = _capture(model, example_inputs, example_kwargs, dynamic_shapes, options)
    return optimize_program(program, options, eager=eager, original=model)


def explain(
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    passes: Recipe = "exact",
) -> Report:
    """The report `compile` would give, with the model left as it is."""
    options = Options(passes)
    program, eager = _capture(model, example_inputs, example_kwargs, dynamic_shapes, options)
    return rewrite_program(program, options, eager)[1]


def _check_target(target: str, providers: Sequence[str] | None) -> None:
    if target not in TARGETS:
        raise GraphoptError(
            f"unknown target {target!r}",
            fix=f"use one of {', '.join(TARGETS)}; for ONNX Runtime write a file with export_onnx",
        )
    if providers is not None:
        raise GraphoptError(
            f"providers have no meaning for target {target!r}", fix="leave providers out"
        )


def _capture(
    model: nn.Module,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    options: Options,
) -> tuple[Program, list[Any]]:
    options.progress("capture")
    args = (args,) if isinstance(args, Tensor) else tuple(args or ())
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    return program, _eager_outputs(model, args, dict(kwargs or {}))


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Run a model once and put its buffers and the random state back."""
    saved = {name: b.detach().clone() for name, b in model.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        yield
        for name, buffer in model.named_buffers():
            if name in saved and saved[name].shape == buffer.shape:
                buffer.copy_(saved[name])


def _eager_outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    with _untouched(model):
        return list(pytree.tree_leaves(model(*args, **kwargs)))


def optimize_program(
    program: Program,
    options: Options,
    eager: list[Any] | None = None,
    original: nn.Module | None = None,
) -> OptimizedModule:
    """Rewrite, verify and emit a captured program.

    Args:
        eager: flat outputs of the original module on the captured inputs, to verify the capture.
        original: the module that ``quality`` is measured on for comparison.

    Raises:
        VerificationError: the whole does not verify; nothing is emitted.
    """
    optimized, report = rewrite_program(program, options, eager)
    if not report.verified:
        raise VerificationError(
            f"the optimized {program.name} does not verify: {_worst(report.whole)}",
            fix="keep the original; `passes` can leave out the pass named in the report",
        )
    options.progress("emit")
    module = OptimizedModule(optimized, report)
    if options.target == "inductor":
        from graphopt.emit.inductor import to_inductor

        to_inductor(module, program, options)
    _hold_quality(module, original, options)
    return module


def rewrite_program(
    program: Program, options: Options, eager: list[Any] | None = None
) -> tuple[Program, Report]:
    """Run the recipe; returns the rewritten program and the filled report."""
    passes = resolve(options.passes)
    report = _new_report(program, passes)
    context = Context.of(program, strict=options.strict, measure=options.measure)
    context.inputs += _calibration_inputs(program, options.calibration)
    context.report, context.progress = report, options.progress
    start = time.perf_counter()
    captured = _certify_capture(program, eager, report)
    optimized = run_passes(program, passes, context)
    options.progress("verify the whole")
    report.verified = certify(program, optimized, context, name="whole program") and captured
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
        compare(e, r, e, Numeric.LOSSY, tolerance=_capture_tolerance(e))
        for e, r in zip(eager, results, strict=True)
    ]
    found = worst(rows)
    report.whole.append(_capture_certificate(found, program))
    return found.ok


def _capture_tolerance(value: Any) -> float:
    """A captured graph runs the same kernels; only their choice may differ with strides."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return 64 * torch.finfo(value.dtype).eps if floating else 0.0


def _capture_certificate(found: Any, program: Program) -> Certificate:
    from graphopt.verify.whole import hash_inputs

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


def _hold_quality(module: OptimizedModule, original: nn.Module | None, options: Options) -> None:
    if options.quality is None or original is None:
        return
    options.progress("quality")
    before, after = options.quality(original), options.quality(module)
    module.report.notes.append(f"quality {before:.6g} before, {after:.6g} after")
    if before - after > options.budget:
        raise VerificationError(
            f"quality fell from {before:.6g} to {after:.6g}, more than the budget {options.budget:g}",
            fix="raise `budget`, or choose passes that lose less",
        )


def _worst(certificates: Sequence[Certificate]) -> str:
    bad = [c for c in certificates if c.notes]
    if not bad:
        return "see the report"
    return f"{bad[0].rule}: {', '.join(bad[0].notes)} (error {bad[0].error:.2g})"
