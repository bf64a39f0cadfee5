"""Keeping a model's contract while passes of other libraries run on it.

They take initializers that callers may override for constants, drop them from the inputs, merge
nodes that draw random numbers, and fold what makes the file grow.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from graphopt.onnx_files.random_nodes import is_deterministic

_TALKATIVE = ("onnx_ir", "onnxscript")
_HIDDEN = "graphopt.hidden."


@contextmanager
def guarded(model: Any, hides: Callable[[Any], bool] = lambda _node: False) -> Iterator[None]:
    """Hide, while the block runs, what passes must not look into.

    Nodes are hidden in a domain of their own each, so that no two look alike: those that are not
    known to be deterministic, and those that ``hides`` is true of.
    """
    overridable = {v.name: v for v in model.graph.initializers.values() if v.is_graph_input()}
    inputs = list(model.graph.inputs)
    tensors = {name: value.const_value for name, value in overridable.items()}
    for name, value in overridable.items():
        del model.graph.initializers[name]
        value.const_value = None
    homes = _hide(model, hides)
    try:
        with silent():
            yield
    finally:
        _show(model, homes)
        for name, value in overridable.items():
            value.const_value = tensors[name]
            model.graph.initializers[name] = value
        if [v.name for v in model.graph.inputs] != [v.name for v in inputs]:
            raise RuntimeError("a pass changed the inputs of the model")


@contextmanager
def silent() -> Iterator[None]:
    """Without what the libraries log of graphs that they leave alone."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _hide(model: Any, hides: Callable[[Any], bool]) -> dict[str, str]:
    homes: dict[str, str] = {}
    for holder in (model.graph, *model.functions.values()):
        for node in holder.all_nodes():
            called = node.op_identifier() in model.functions
            if not called and (hides(node) or not is_deterministic(node)):
                alias = f"{_HIDDEN}{len(homes)}"
                homes[alias], node.domain = node.domain, alias
                holder.opset_imports[alias] = 1
    return homes


def _show(model: Any, homes: dict[str, str]) -> None:
    for holder in (model.graph, *model.functions.values()):
        for alias in [d for d in holder.opset_imports if d.startswith(_HIDDEN)]:
            del holder.opset_imports[alias]
        for node in holder.all_nodes():
            node.domain = homes.get(node.domain, node.domain)
