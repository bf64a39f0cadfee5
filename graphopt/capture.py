"""Ahead-of-time capture: an ``nn.Module`` and example inputs become a `Program`.

`torch.export` traces the module without Dynamo; decomposing with an empty table leaves functional
ATen with composites kept. What torch leaves undone is done around that: regions without gradients
keep their meaning, tied parameters stay one tensor, axes stay dynamic or are refused by name, side
effects are seen, and the model is left as it was.
"""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt import huggingface
from graphopt.capture_axes import Axes
from graphopt.capture_checks import check_model, checked_call, register_dataclasses, unwrapped
from graphopt.capture_errors import (
    explain_capture_failure,
    refuse_fixed_axes,
    refuse_lost_gradients,
    refuse_side_effects,
)
from graphopt.capture_exported import from_exported
from graphopt.capture_limits import fixed_axes, settle, watching_constants
from graphopt.capture_specs import Call, declared_axes
from graphopt.capture_watch import Watch, watched
from graphopt.errors import CaptureError
from graphopt.program import CallSpec, Program


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    frozen: bool | None = None,
    specialize: Literal["refuse", "allow"] = "refuse",
) -> Program:
    """Capture ``model`` called as ``model(*args, **kwargs)``. The model is left as it was.

    Args:
        model: in training or eval mode; the program keeps that mode.
        dynamic_shapes: axes that must stay dynamic, as `torch.export.export` takes them, or with
            names: ``{"input_ids": {0: "batch", 1: "seq"}}``. Axes of one name have one size.
        frozen: whether parameter values may be folded; default: yes exactly in eval mode.
        specialize: what happens to an axis declared dynamic that the model turns into a constant:
            ``"refuse"`` raises, ``"allow"`` keeps it constant and says so in ``program.notes``.

    Raises:
        CaptureError: with one cause at the user's source line and what to change.
    """
    model, notes = unwrapped(model)
    check_model(model)
    example = _example(model, tuple(args), dict(kwargs or {}))
    axes = declared_axes(example.model, example.call, dynamic_shapes)
    keep = not model.training if frozen is None else frozen
    program = _trace(example, axes, frozen=keep)
    program.name = type(model).__name__
    program.example_inputs = tuple(pytree.tree_leaves(example.call))
    program.notes[:0] = [*notes, *example.notes]
    program.call = _call_spec(example, program)
    _settle_axes(program, example, axes, specialize)
    return program


@dataclass(frozen=True)
class Example:
    """The example call in the form in which it is traced."""

    model: nn.Module
    call: Call
    flags: dict[str, Any] = field(default_factory=dict)
    hugging_face: list[nn.Module] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_hugging_face(self) -> bool:
        return bool(self.hugging_face) and self.hugging_face[0] is self.model

    def run(self) -> Any:
        """The model's own answer on a copy of the example."""
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, self.call)
        return self.model(*args, **kwargs, **self.flags)


def _example(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Example:
    checked_call(model, args, kwargs)
    args, kwargs = pytree.tree_map_only(Tensor, _usable, (args, kwargs))
    found = huggingface.pretrained_models(model)
    if not found or found[0] is not model:
        return Example(model, (args, kwargs), hugging_face=found)
    values, flags = huggingface.by_keyword(model, args, kwargs)
    with torch.no_grad():
        added = huggingface.precomputed(model, values)
    notes = [f"{name} is computed from the other inputs before the call: pass it" for name in added]
    return Example(model, ((), values), flags, found, notes)


def _usable(value: Tensor) -> Tensor:
    """Inference tensors cannot take part in a trace with gradients; their copies can."""
    return value.clone() if value.is_inference() else value


def _trace(example: Example, axes: Axes, *, frozen: bool) -> Program:
    model = example.model
    (args, kwargs), shapes = axes.marked(axes.enlarged(example.call))
    dynamic: Any = shapes
    try:
        with _scene(example, axes) as watch:
            exported = torch.export.export(
                model, args, kwargs, dynamic_shapes=dynamic, strict=False
            )
            notes = refuse_lost_gradients(model, watch, frozen=frozen)
            program = from_exported(exported, training=model.training, frozen=frozen)
    except Exception as error:
        raise explain_capture_failure(error, model) from error
    notes += refuse_side_effects(model, watch, example.run)
    program.notes += [*watch.notes, *notes]
    return program


@contextmanager
def _scene(example: Example, axes: Axes) -> Iterator[Watch]:
    """Everything that is in force during a trace, undone afterwards.

    Gradients are on, so that regions without them are seen; Hugging Face models run through their
    export patches; the last forward hook makes dataclasses known before torch takes them apart.
    """
    model = example.model
    with ExitStack() as stack:
        stack.enter_context(_silence())
        watch = stack.enter_context(watched(model))
        stack.enter_context(torch.enable_grad())
        if example.hugging_face:
            stack.enter_context(huggingface.tracing_patches(example.hugging_face))
        if example.is_hugging_face:
            names = list(example.call[1])
            stack.enter_context(huggingface.flat_forward(model, names, example.flags))
        before = model.register_forward_pre_hook(
            lambda _m, args, kwargs: axes.tie(args, kwargs), prepend=True, with_kwargs=True
        )
        after = model.register_forward_hook(lambda _m, _args, output: _leave(watch, output))
        stack.callback(before.remove)
        stack.callback(after.remove)
        yield watch


def _leave(watch: Watch, output: Any) -> None:
    """At the end of the traced forward, before torch takes its output and its attributes back."""
    watch.look()
    register_dataclasses(output)


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings, logs or graph dumps of torch: what matters becomes a note or an error."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


def _call_spec(example: Example, program: Program) -> CallSpec:
    assert program.call is not None
    parameters = inspect.signature(example.model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return replace(
        program.call,
        positional=tuple(p.name for p in parameters if p.kind in kinds),
        defaults={p.name: p.default for p in parameters if p.default is not p.empty},
        fixed=dict(example.flags),
    )


def _settle_axes(program: Program, example: Example, axes: Axes, specialize: str) -> None:
    """Declared axes must have stayed dynamic, or the user is told which did not."""
    fixed = fixed_axes(program, axes, example.call)
    firm = [(axis, size) for axis, size in fixed if not axis.optional and specialize != "allow"]
    if firm:
        refuse_fixed_axes(firm, lambda: _line_that_fixes(example, axes, firm[0][1]))
    program.notes += [f"{axis} is fixed at {size} by the model" for axis, size in fixed]
    settle(program, axes, example.call)


def _line_that_fixes(example: Example, axes: Axes, size: int) -> str | None:
    """Trace again and watch where a symbol becomes ``size``."""
    with watching_constants(size) as lines, suppress(CaptureError):
        _trace(example, axes, frozen=True)
    return lines[-1] if lines else None


__all__ = ["Example", "capture", "from_exported"]
