"""One cause, at the user's line, for everything that torch can say when tracing fails."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch
from torch import nn

from graphopt.errors import CaptureError

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)

CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"data-dependent|GuardOnDataDependent|Could not (guard|extract)",
        "control flow depends on the values of a tensor",
        "replace the branch by torch.where or torch.cond, or pass the value as a Python argument",
    ),
    (
        r"fake tensor in the exported program constant",
        "a tensor is taken out of the graph (through .data, .numpy() or a Python container)",
        "use .detach() instead of .data, and keep tensors as inputs, parameters or buffers",
    ),
    (
        r"0/1 specialized due to hint of 1|specialized.*hint",
        "an axis that must stay dynamic has the example size 1",
        "give example inputs with at least 2 along every dynamic axis",
    ),
    (
        r"Constraints violated|not all values of .* satisfy|specializ|inferred to be a constant",
        "an axis declared dynamic is fixed by the model",
        "leave that axis out of dynamic_shapes, or remove the fixed size from the model",
    ),
    (
        r"numpy|\.numpy\(\)|\.tolist\(\)|\.item\(\)",
        "a tensor is turned into a Python or NumPy value",
        "stay in torch operations, or compute the value before the call",
    ),
    (
        r"dynamic_shapes",
        "dynamic_shapes does not have the structure of the inputs",
        "give one entry per input, by name, as torch.export.export takes them",
    ),
    (
        r"missing \d+ required|unexpected keyword argument|takes .* positional argument",
        "the example inputs do not fit the model's forward",
        "pass the arguments that forward takes",
    ),
)


def explain_capture_failure(error: Exception, model: nn.Module) -> CaptureError:
    """The cause of a failed trace as a `CaptureError`."""
    if isinstance(error, CaptureError):
        return error
    text = str(error)
    line = _user_line(error)
    for pattern, what, fix in CAUSES:
        if re.search(pattern, text):
            return CaptureError(
                f"cannot capture {type(model).__name__}: {what}: {_first(text)}",
                where=line,
                fix=fix,
            )
    return CaptureError(
        f"cannot capture {type(model).__name__}: {type(error).__name__}: {_first(text)}",
        where=line,
        fix="run the model once in eager mode with the same inputs; then see torch.export's limits",
    )


def _first(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"


def _user_line(error: BaseException) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_TORCH, _HERE, "<"))]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else None
