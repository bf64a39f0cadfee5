"""Where in the user's own code a node comes from."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)\n?(?P<code>[^\n]*)'
)
_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


def source_line(node: fx.Node) -> str | None:
    """``file:line`` of the innermost frame outside torch and graphopt, or ``None`` if unknown."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not f[0].startswith((_TORCH, _HERE, "<"))]
    chosen = own or frames
    return f"{chosen[-1][0]}:{chosen[-1][1]}" if chosen else None


def source_code(node: fx.Node) -> str | None:
    """The text of that line, where the trace carries it."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not f[0].startswith((_TORCH, _HERE, "<"))] or frames
    return own[-1][3].strip() or None if own else None


def module_path(node: fx.Node) -> str:
    """Path of the ``nn.Module`` whose forward made the node, such as ``encoder.layer.0``."""
    stack = node.meta.get("nn_module_stack") or {}
    last = list(stack.values())[-1] if stack else ("", None)
    return str(last[0])
