"""One cause, at the user's line, for everything that torch can say when tracing fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn

from graphopt.capture_axes import Axis
from graphopt.capture_watch import Watch, remembers
from graphopt.errors import CaptureError, GraphoptError
from graphopt.source import frames_of_traceback, innermost

CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"mutated in the forward method\. Pls register it as buffer",
        "forward writes a tensor that is a plain attribute",
        "register it with register_buffer(name, tensor)",
    ),
    (
        r"attributes? .* (was|were) assigned during export",
        "forward assigns a tensor to an attribute",
        "register it with register_buffer(name, tensor), or return it",
    ),
    (
        r"fake tensor in the exported program constant",
        "a tensor is taken out of the graph (through .data, or kept from an earlier call)",
        "use .detach() instead of .data, and keep tensors as inputs, parameters or buffers",
    ),
    (
        r"Could not extract specialized integer|type must be tuple of ints,but got FakeTensor"
        r"|unbind.*data-dependent|Cannot (iterate|unpack)",
        "the value of a tensor is used as a Python number (a size, a loop bound, an index)",
        "pass it as a Python argument, or use tensor operations such as masks",
    ),
    (
        r"Could not guard on data-dependent expression (Eq|Ne)\((\d+\*)?u\d+, 0\)",
        "an operator asks whether rows that values select (x[mask]) are none",
        "apply it before the selection (x.logsumexp(-1)[mask]), or, where some are always "
        "selected, say so behind it: torch._check(x.shape[0] > 0)",
    ),
    (
        r"Could not guard on data-dependent expression (Eq|Ne)\(u\d+, u\d+\)",
        "an operator asks whether two selections by values (x[a], y[b]) are of one size",
        "select by one mask, computed once: keep = labels != -100; x[keep], labels[keep]",
    ),
    (
        r"data-dependent|GuardOnDataDependent|Could not guard",
        "control flow depends on the values of a tensor",
        "replace the branch by torch.where or torch.cond, or pass the value as a Python argument",
    ),
    (
        r"unsupported format string passed to (FakeTensor|Tensor)",
        "the value of a tensor is formatted for printing",
        "print outside forward, or only when not torch.compiler.is_exporting()",
    ),
    (
        r"\.numpy\(\)|numpy|\.tolist\(\)",
        "a tensor is turned into a NumPy value",
        "stay in torch operations, or compute the value before the call",
    ),
    (
        r"Inference tensors cannot be saved|Setting requires_grad=True on inference tensor",
        "a tensor was created under torch.inference_mode",
        "create it outside torch.inference_mode, or pass a clone",
    ),
    (
        r"Found <class '.*'> in output, which is not a known type",
        "forward returns an object that a graph cannot return",
        "return tensors, numbers, None, or lists, tuples, dicts and dataclasses of them",
    ),
    (
        r"Expected all tensors to be on the same device|is on (meta|cpu|cuda.*), expected"
        r"|found two different devices",
        "tensors on different devices meet",
        "put the model and all inputs on one device",
    ),
    (
        r"DynamicOutputShapeException|aten\._ctc_loss",
        "the shape of a result depends on the values of a tensor",
        "leave that operator out of the captured model, or use one with a fixed shape",
    ),
    (
        r"_apply\(\): Couldn't swap",
        "forward moves or casts one of its modules (module.to)",
        "cast the module before the call, or its input inside forward",
    ),
    (
        r"must have same reduction dim|size of tensor a|cannot be multiplied|shape '.*' is invalid",
        "the shapes of the example inputs do not fit the model",
        "call the model once in eager mode with the same inputs, and correct the sizes",
    ),
    (
        r"missing .*required|unexpected keyword argument|positional argument",
        "a module is called with the wrong arguments",
        "pass the arguments that its forward takes",
    ),
)
_DEFAULT_FIX = "call the model once in eager mode with the same inputs; it must run there first"


def explain_capture_failure(error: Exception, model: nn.Module) -> GraphoptError:
    """The cause of a failed trace as a `CaptureError`."""
    if isinstance(error, GraphoptError):
        return error
    name, text = type(model).__name__, f"{type(error).__name__}: {error}"
    frame = innermost(frames_of_traceback(error.__traceback__))
    where = str(frame) if frame else None
    for pattern, what, fix in CAUSES:
        if re.search(pattern, text):
            return CaptureError(f"cannot capture {name}: {what}", where=where, fix=fix)
    what = f"cannot capture {name}: {first_line(error)}"
    return CaptureError(what, where=where, fix=_DEFAULT_FIX)


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def refuse_fixed_axes(fixed: Sequence[tuple[Axis, int]], line: Callable[[], str | None]) -> None:
    """Raise for declared axes that the model turned into constants."""
    shown = "; ".join(f"{axis} to {size}" for axis, size in fixed)
    raise CaptureError(
        f"declared dynamic, but the model fixes {shown}",
        where=line(),
        fix="leave the axis out of dynamic_shapes (on the command line, write its size in place of "
        "its name), declare it torch.export.Dim.AUTO to keep it dynamic only where the model does, "
        "or compute the size from x.shape instead of writing a number",
    )


def refuse_lost_gradients(model: nn.Module, watch: Watch, *, frozen: bool) -> list[str]:
    """Sentences about gradients that a frozen program does not keep; raises where it must."""
    lost = [*watch.lost_gradients, *_backward_hooks(model)]
    if lost and not frozen:
        what, where = lost[0]
        raise CaptureError(
            f"cannot capture {type(model).__name__} for training: {what} would be lost",
            where=where,
            fix="write it with tensor operations (x + (f(x) - x).detach() passes gradients "
            "through), or as a torch.library.custom_op with register_autograd; or capture in eval "
            "mode",
        )
    return [f"not part of the program: {what}{f', at {x}' if x else ''}" for what, x in lost]


def _backward_hooks(model: nn.Module) -> list[tuple[str, str | None]]:
    return [
        (f"the backward hook of {type(module).__name__}", f"submodule {path}" if path else None)
        for path, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]


def refuse_side_effects(model: nn.Module, watch: Watch, run: Callable[[], object]) -> list[str]:
    """Sentences about harmless side effects of forward; raises for those that change results."""
    name = type(model).__name__
    if watch.reseeded:
        raise CaptureError(
            f"cannot capture {name}: forward sets the seed of the random generator",
            fix="call torch.manual_seed before the call, not inside forward",
        )
    if watch.drew:
        raise CaptureError(
            f"cannot capture {name}: forward draws from {watch.drew}, and the number would become "
            "a constant",
            fix="draw with torch.rand, or draw before the call and pass the number as an input",
        )
    if not watch.changed:
        return []
    if remembers(model, run):
        attribute = watch.changed[0]
        raise CaptureError(
            f"cannot capture {name}: forward writes `{attribute}`, and the next call depends on it",
            where=attribute,
            fix="keep it in a buffer (register_buffer) and write it in place, or return it",
        )
    return [f"forward sets `{attribute}`; the program does not" for attribute in watch.changed]
