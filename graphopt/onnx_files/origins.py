"""Where nodes of an ONNX file come from, as far as its exporter wrote that down.

torch's exporter writes the stack and the path of modules of each node; older ones name nodes so.
"""

from __future__ import annotations

import ast
from typing import Any

from graphopt.onnx_files.steps import label
from graphopt.source import frames_in, innermost

_STACK, _SCOPES = "pkg.torch.onnx.stack_trace", "pkg.torch.onnx.name_scopes"


def source_of(node: Any) -> str | None:
    """The user's ``file:line``."""
    frame = innermost(frames_in(node.metadata_props.get(_STACK, "")))
    return str(frame) if frame else None


def sources(model: Any) -> dict[str, str]:
    """The lines of all nodes that have one, by their labels."""
    found = ((label(node), source_of(node)) for node in model.graph.all_nodes())
    return {name: line for name, line in found if line is not None}


def module_of(node: Any) -> str:
    """The path of the module that a node belongs to: ``encoder.layer.0``; empty for the model."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # of a file that is not trusted
        scopes = []
    if isinstance(scopes, list) and len(scopes) > 1 and isinstance(scopes[-2], str):
        return scopes[-2]
    parts = str(node.name or "").strip("/").split("/")[:-1]
    return ".".join(part for part in parts if part)
