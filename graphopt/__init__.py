"""graphopt: capture a PyTorch model, rewrite its graph, prove each rewrite, lower it, explain it.

Names are loaded when first used: ``import graphopt`` costs little more than ``import torch``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.artifact import load, save
    from graphopt.emit.checkpoint import export_huggingface
    from graphopt.emit.onnx import export_onnx
    from graphopt.emit.onnx_folder import export_onnx_folder
    from graphopt.errors import GraphoptError
    from graphopt.onnx_files.optimize import optimize_onnx
    from graphopt.optimize import compile, explain
    from graphopt.registered import register_backend
    from graphopt.report.model import Report

__version__ = version("graphopt")

_HOMES = {
    "GraphoptError": "graphopt.errors",
    "Report": "graphopt.report.model",
    "compile": "graphopt.optimize",
    "explain": "graphopt.optimize",
    "export_huggingface": "graphopt.emit.checkpoint",
    "export_onnx": "graphopt.emit.onnx",
    "export_onnx_folder": "graphopt.emit.onnx_folder",
    "load": "graphopt.artifact",
    "optimize_onnx": "graphopt.onnx_files.optimize",
    "register_backend": "graphopt.registered",
    "save": "graphopt.artifact",
}

__all__ = [
    "GraphoptError",
    "Report",
    "compile",
    "explain",
    "export_huggingface",
    "export_onnx",
    "export_onnx_folder",
    "load",
    "optimize_onnx",
    "register_backend",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'graphopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
