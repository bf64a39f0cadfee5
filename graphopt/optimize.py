"""`graphopt.compile` and `graphopt.explain`: capture, rewrite, verify, emit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.capture import capture
from graphopt.emit.module import OptimizedModule
from graphopt.errors import GraphoptError, VerificationError
from graphopt.presets import Recipe
from graphopt.program import OutputKind, Program
from graphopt.recipe import Options, rewrite_program
from graphopt.report.model import Certificate, Report
from graphopt.verify.measure import equal_bits
from graphopt.verify.replay import SEED

TARGETS = ("torch", "inductor")


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
    Without, the model is compiled through Dynamo as it is called, so graph breaks, training loops
    and ``generate()`` keep working.

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
) -> Report:
    """The report `compile` would give, with the model left as it is."""
    options = Options(passes)
    program, eager = capture_model(model, example_inputs, example_kwargs, dynamic_shapes)
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


def capture_model(
    model: nn.Module,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
) -> tuple[Program, list[Any]]:
    """Capture a module, and run it once: the program and what the module's own run gave.

    That is the values of the program's outputs, what is written into inputs and buffers included.
    """
    args = (args,) if isinstance(args, Tensor) else tuple(args or ())
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    call, copies = (args, dict(kwargs or {})), {}
    if any(o.kind is OutputKind.INPUT_MUTATION for o in program.outputs):
        call, copies = _copied(call)
    with _untouched(model):
        outputs = pytree.tree_leaves(model(*call[0], **call[1]))
        values = [*_written(program, model, copies), *outputs]
        return program, [v.detach().clone() if isinstance(v, Tensor) else v for v in values]


def _copied(call: Any) -> tuple[Any, dict[int, Tensor]]:
    """Arguments for a model that writes into them, and the copies by the originals' ids.

    Tensors that shared memory still do.
    """
    memo: dict[int, Any] = {}
    copies = {id(t): t for t in pytree.tree_leaves(call) if isinstance(t, Tensor)}
    copies = {key: deepcopy(t.detach(), memo) for key, t in copies.items()}
    return pytree.tree_map_only(Tensor, lambda t: copies[id(t)], call), copies


def _written(program: Program, model: nn.Module, copies: Mapping[int, Tensor]) -> list[Tensor]:
    """What a run left in buffers and inputs, in the order of the program's outputs.

    Empty where the program's inputs are not the caller's own tensors.
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    given = {n.name: v for n, v in zip(program.user_inputs(), program.example_inputs, strict=True)}
    found = []
    for output in program.outputs:
        if output.kind is OutputKind.BUFFER_MUTATION:
            found.append(buffers.get(output.target or ""))
        elif output.kind is OutputKind.INPUT_MUTATION:
            found.append(copies.get(id(given.get(output.target or ""))))
    known = [v for v in found if v is not None]
    return known if len(known) == len(found) else []


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Run a model once and put its buffers and the random state back."""
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        yield
        for module, name, buffer, value in saved:
            module._buffers[name] = buffer
            if not equal_bits(buffer, value):
                buffer.copy_(value)


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
    module = OptimizedModule(optimized, report, program)
    if options.target == "inductor":
        from graphopt.emit.inductor import to_inductor

        to_inductor(module, program, options)
    _hold_quality(module, original, options)
    return module


def _hold_quality(module: OptimizedModule, original: nn.Module | None, options: Options) -> None:
    if options.quality is None or original is None:
        return
    options.progress("quality")
    before, after = options.quality(original), options.quality(module)
    module.report.notes.append(f"quality {before:.6g} before, {after:.6g} after")
    if before - after > options.budget:
        raise VerificationError(
            f"quality fell from {before:.6g} to {after:.6g}; the budget allows {options.budget:g}",
            fix="raise `budget`, or choose passes that lose less",
        )


def _worst(certificates: Sequence[Certificate]) -> str:
    bad = [c for c in certificates if c.notes]
    if not bad:
        return "see the report"
    return f"{bad[0].rule}: {', '.join(bad[0].notes)} (error {bad[0].error:.2g})"
