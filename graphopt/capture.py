"""Ahead-of-time capture: an ``nn.Module`` and example inputs become a `Program`.

`torch.export` traces the module without Dynamo; decomposing with an empty table leaves functional
ATen with composites kept. What torch leaves undone is done around that: regions without gradients
keep their meaning, tied parameters stay one tensor, axes stay dynamic or are refused by name, side
effects are seen, and the model is left as it was.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt import huggingface
from graphopt.capture_axes import Axes
from graphopt.capture_call import Example, call_spec, example_call, flat_forward
from graphopt.capture_checks import check_model, register_dataclasses, unwrapped
from graphopt.capture_errors import (
    explain_capture_failure,
    refuse_fixed_axes,
    refuse_lost_gradients,
    refuse_side_effects,
)
from graphopt.capture_exported import from_exported
from graphopt.capture_limits import fixed_axes, settle, watching_constants
from graphopt.capture_ones import eager, settle_ones
from graphopt.capture_specs import declared_axes
from graphopt.capture_watch import Watch, watched
from graphopt.errors import CaptureError
from graphopt.program import Program


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

    Where a dynamic axis may have size 1, the model is run there and compared with the graph; a size
    at which they differ becomes an assumption that calls must meet.

    Raises:
        CaptureError: with one cause at the user's source line and what to change.
    """
    if specialize not in ("refuse", "allow"):
        raise CaptureError(f"specialize={specialize!r}", fix="use 'refuse' or 'allow'")
    model, notes = unwrapped(model)
    check_model(model)
    example = example_call(model, tuple(args), dict(kwargs or {}))
    axes = declared_axes(example.model, example.call, dynamic_shapes)
    keep = not model.training if frozen is None else frozen
    program = _trace(example, axes, frozen=keep)
    program.name = type(model).__name__
    program.example_inputs = tuple(pytree.tree_leaves(example.call))
    program.notes[:0] = [*notes, *example.notes]
    program.call = call_spec(example, program)
    _settle_axes(program, example, axes, specialize)
    settle_ones(program, eager(example))
    return program


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
        stack.enter_context(flat_forward(example))
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
    return lines[0] if lines else None


__all__ = ["Example", "capture", "from_exported"]
