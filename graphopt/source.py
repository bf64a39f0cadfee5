"""Where in the user's own code a node comes from."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import fx


class Frame(NamedTuple):
    """One line of a stack, outermost first in every list of this module."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in ')
_PACKAGE = Path(__file__).parent
_CAPTURE = str(_PACKAGE / "capture.py")
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"] + "/"
_OWN = (_PACKAGE, _PACKAGE.parent / "passes", _PACKAGE.parent / "kernels")
_TOOLS = tuple(f"{folder}/" for folder in (Path(torch.__file__).parent, *_OWN))
_LIBRARIES = re.compile(r"/(site|dist)-packages/(functorch|sympy|numpy|networkx)/")


def is_user_file(file: str) -> bool:
    """Whether a file is the user's or a model library's: not torch, graphopt or Python itself."""
    if file.startswith(("<", "torch/", *_TOOLS)) or _LIBRARIES.search(file):
        return False
    installed = "/site-packages/" in file or "/dist-packages/" in file
    return installed or not file.startswith(_STANDARD_LIBRARY)


def _is_plumbing(file: str) -> bool:
    """Whether a file of transformers only wraps what a modeling file computes."""
    return "/transformers/" in file and "/transformers/models/" not in file


def innermost(frames: Sequence[Frame]) -> Frame | None:
    """The frame a user looks for: the last one in their own code, model definitions first."""
    own = [f for f in frames if is_user_file(f.file)]
    chosen = [f for f in own if not _is_plumbing(f.file)] or own
    return chosen[-1] if chosen else None


def frames_of(node: fx.Node) -> list[Frame]:
    """The stack under which the node was traced."""
    return frames_in(node.meta.get("stack_trace") or "")


def frames_in(text: str) -> list[Frame]:
    """The frames of a stack as Python prints it."""
    return [Frame(file, int(line)) for file, line in _FRAME.findall(text)]


def frames_of_traceback(trace: TracebackType | None) -> list[Frame]:
    """The stack of an exception."""
    return _frames(traceback.extract_tb(trace))


def calling_line() -> str | None:
    """The user's ``file:line`` that is being executed."""
    frame = innermost(_frames(traceback.extract_stack()))
    return str(frame) if frame else None


def traced_line() -> str | None:
    """The line being executed inside a trace; ``None`` where only its caller is the user's."""
    frames = _frames(traceback.extract_stack())
    start = next((i for i, f in enumerate(frames) if f.file == _CAPTURE), len(frames))
    frame = innermost(frames[start:])
    return str(frame) if frame else None


def _frames(summaries: Iterable[traceback.FrameSummary]) -> list[Frame]:
    return [Frame(s.filename, s.lineno or 0) for s in summaries]


def source_line(node: fx.Node) -> str | None:
    """``file:line`` in the user's code, or ``None`` where no frame of the stack is the user's."""
    frame = innermost(frames_of(node))
    return str(frame) if frame else None


def module_path(node: fx.Node) -> str:
    """Path of the ``nn.Module`` whose forward made the node, such as ``encoder.layer.0``.

    Nodes that torch's own passes add may stand in no module; torch then fills in a placeholder.
    """
    stack = node.meta.get("nn_module_stack") or {}
    known = [str(entry[0]) for entry in stack.values() if entry[0] != _NO_MODULE]
    return known[-1] if known else ""
