"""Dynamic axes of an ONNX model under the names that the user gave them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from graphopt.program import Program


def name_axes(model: Any, program: Program) -> None:
    """Rename the symbols in all shapes of an ``onnx_ir`` model, in place: ``s77`` to ``batch``.

    A size computed from named ones keeps its formula: ``2*s77`` becomes ``2*batch``. A name that
    the model has already for something else stays with that.
    """
    import onnx_ir

    names = {str(symbol): name for symbol, name in program.axis_names.items()}
    if not names:
        return
    word = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    for value in _values(model):
        if value.shape is None or value.shape.frozen:
            continue
        for index, size in enumerate(value.shape):
            text = getattr(size, "value", None)
            if isinstance(text, str) and (found := word.sub(lambda m: names[m[1]], text)) != text:
                value.shape[index] = onnx_ir.SymbolicDim(found)


def _values(model: Any) -> Iterator[Any]:
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs
    yield from model.graph.outputs
