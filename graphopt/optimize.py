"""`graphopt.compile` and `graphopt.explain`: capture, rewrite, verify, emit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Real
from typing import Any

from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.emit.module import OptimizedModule
from graphopt.errors import GraphoptError, VerificationError
from graphopt.original import run_original
from graphopt.presets import Recipe, resolve
from graphopt.program import Program
from graphopt.recipe import Options, rewrite_program
from graphopt.report.model import Certificate, Report
from graphopt.room import crowded


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

    With ``example_inputs`` or ``example_kwargs`` the whole graph is captured ahead of time. In eval
    mode weights may be folded into others; a later write in place to one of those is an error at
    the next call. All other tensors are shared with the original.
    Without, a twin of the model's own class, which shares all it holds, is compiled through Dynamo
    as it is called, so graph breaks, training loops and ``generate()`` keep working.

    Args:
        dynamic_shapes: axes that must stay dynamic, as `torch.export.export` takes them.
        passes: ``"exact"`` (default), another preset, a YAML recipe, a pass, or a sequence of them.
        calibration: inputs that passes learn from, such as ``QuantizeMatmul(method="gptq")``, and
            that the result is verified on besides ``example_inputs``, which it needs: a sequence of
            tensors, tuples or dicts that fit the captured signature. The first few serve
            verification.
        quality: ``quality(module) -> float``, higher is better; checked against ``budget``. It
            needs ``example_inputs`` too.
        budget: how far ``quality`` may fall below the original's, absolute.
        target: ``"torch"``; ``"inductor"`` to hand the rewritten graph on to Inductor; or
            ``"onnxruntime"`` to run regions of it in ONNX Runtime where they are faster. They
            compute no gradients: a call where one is asked for is an error. The model must be in
            eval mode, and ``example_inputs`` are needed.
        providers: execution providers for ``"onnxruntime"`` in the order of preference, by full or
            short name (``"cpu"``, ``"cuda"``, ...); by default that of the model's device.
        strict: raise `VerificationError` instead of keeping the original where a rewrite fails.
        measure: keep only rewrites that are not slower on this machine.
        progress: called with a line of text as the work proceeds.

    Raises:
        RecipeError: ``passes`` is no recipe.
        GraphoptError: ``calibration``, ``quality`` or another argument does not fit.
        CaptureError: the model cannot be captured.
        VerificationError: the result is wrong (always for the whole, with ``strict`` for any part).
    """
    told, steps = progress or (lambda _text: None), resolve(passes)
    options = Options(steps, calibration, quality, budget, target, providers, strict, measure, told)
    if example_inputs is None and example_kwargs is None:
        from graphopt.backend import compile_dynamic

        return compile_dynamic(model, options, dynamic_shapes)
    options.progress("capture")
    program, eager = capture_model(model, example_inputs, example_kwargs, dynamic_shapes)
    return optimize_program(program, options, eager=eager, original=model)


def explain(
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    passes: Recipe = "exact",
    calibration: Iterable[Any] | None = None,
) -> Report:
    """The report `compile` would give, with the model left as it is."""
    options = Options(resolve(passes), calibration)
    program, eager = capture_model(model, example_inputs, example_kwargs, dynamic_shapes)
    return rewrite_program(program, options, eager)[1]


def capture_model(
    model: nn.Module,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
) -> tuple[Program, list[Any] | None]:
    """Capture a module, and run it once: the program, and what `run_original` gave.

    A module whose values do not fit in memory is not run: the second is ``None`` then.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args or ())
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    if (why := crowded(program)) is not None:
        program.notes.append(f"the captured graph was not compared with the model: {why}")
        return program, None
    return program, run_original(program, model, args, dict(kwargs or {}))


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
        GraphoptError: the target takes no model in training mode.
    """
    if options.target == "onnxruntime":
        from graphopt.emit.ort.lowering import refuse_training

        refuse_training(program)
    judge = None if original is None else _Judge.of(options, original, program)
    optimized, report = rewrite_program(program, options, eager, judge)
    if not report.verified:
        raise VerificationError(
            f"the optimized {program.name} does not verify: {_worst(report.whole)}",
            fix="keep the original; `passes` can leave out the pass named in the report",
        )
    options.progress("emit")
    module = OptimizedModule(optimized, report, program)
    _to_target(module, program, options)
    if judge is not None:
        options.progress("quality")
        judge.hold(module)
    return module


def _to_target(module: OptimizedModule, program: Program, options: Options) -> None:
    """Let the module run as the target wants it; where nothing goes there, as torch does best."""
    if options.target == "onnxruntime":
        from graphopt.emit.ort.lowering import to_onnxruntime

        if to_onnxruntime(module, program, options):
            return
    from graphopt.emit.laid_out import lay_out

    executed = lay_out(module, options)
    if options.target == "inductor":
        from graphopt.emit.inductor import to_inductor

        to_inductor(module, program, options, executed)
    elif executed is None:
        from graphopt.emit.onednn import to_onednn

        to_onednn(module, options)


class _Judge:
    """The user's measure: of the original, which is measured once, of programs and of the result.

    Args:
        program: as captured from the original.
    """

    def __init__(
        self,
        quality: Callable[[nn.Module], float],
        budget: float,
        original: nn.Module,
        program: Program,
    ) -> None:
        self.quality, self.budget = quality, budget
        self.original, self.program = original, program

    @classmethod
    def of(cls, options: Options, original: nn.Module, program: Program) -> _Judge | None:
        if options.quality is None:
            return None
        return cls(options.quality, options.budget, original, program)

    @cached_property
    def before(self) -> float:
        return _score(self.quality, self.original)

    def least(self) -> float:
        return self.before - self.budget

    def __call__(self, program: Program) -> float:
        report = Report(program.name)
        return _score(self.quality, OptimizedModule(program, report, self.program))

    def hold(self, module: OptimizedModule) -> None:
        """Whether the result is within the budget; its report says what was measured.

        Raises:
            VerificationError: it is not.
        """
        before, after, report = self.before, _score(self.quality, module), module.report
        report.notes.append(f"quality {before:.6g} before, {after:.6g} after")
        report.trades = [replace(t, quality=after) if t.chosen else t for t in report.trades]
        if before - after > self.budget:
            raise VerificationError(
                f"quality fell from {before:.6g} to {after:.6g}; the budget allows {self.budget:g}",
                fix="raise `budget`, or choose passes that lose less",
            )


def _score(quality: Callable[[nn.Module], float], module: nn.Module) -> float:
    found: Any = quality(module)
    if isinstance(found, Tensor) and found.numel() == 1 and not found.is_complex():
        found = found.item()
    if not isinstance(found, Real) or not math.isfinite(found):
        shown = f"{type(found).__name__} {found!r:.60}"
        raise GraphoptError(
            f"quality gave {shown}, and not a finite number",
            where="quality",
            fix="return one float, higher is better",
        )
    return float(found)


def _worst(certificates: Sequence[Certificate]) -> str:
    """The first certificate that says what is wrong, with the measures that failed."""
    bad = [c for c in certificates if c.notes]
    if not bad:
        return "see the report"
    found = bad[0]
    measures = [("outputs", found.error, found.bound)]
    if found.gradient_error is not None and found.gradient_bound is not None:
        measures.append(("gradients", found.gradient_error, found.gradient_bound))
    above = [m for m in measures if not m[1] <= m[2]] or measures  # a single entry may be too far
    shown = "; ".join(f"{name}: error {e:.2g}, allowed {bound:.2g}" for name, e, bound in above)
    return f"{found.rule}: {', '.join(found.notes)} ({shown})"
