"""Additions and the norms behind them as two operators instead of one.

ONNX Runtime's ``SkipLayerNormalization`` is slow on CPUs: 1,024 rows of 384 take 1.95 ms on one
thread, and ``Sum`` with ``LayerNormalization`` 0.32 ms (with RMS norms 0.42 and 0.16 ms). It makes
one operator of ``Add`` and a norm itself, but not of ``Sum``. Elsewhere, as on GPUs, one may be the
faster.
"""

from __future__ import annotations

import copy
from typing import Any

from graphopt.emit.onnx_quantized.emitter import MICROSOFT, Emitter

_NORMS = {
    "SkipLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
}
FUSIONS = ("skip_layer_normalization", "skip_rms_normalization")
"""What onnxscript calls them."""


def sums_apart(program: Any) -> Any | None:
    """A copy of a `torch.onnx.ONNXProgram` with sums before norms; None where it has no norm of a
    sum.

    In float32 alone: ONNX Runtime has no ``Sum`` of halves on a CPU.
    """
    twin = copy.copy(program)
    twin.model = program.model.clone()
    found = [node for node in twin.model.graph.all_nodes() if _fits(node)]
    for node in found:
        _split(node) if node.domain else _renamed(node)
    if not any(node.domain == MICROSOFT for node in twin.model.graph.all_nodes()):
        twin.model.opset_imports.pop(MICROSOFT, None)
    return twin if found else None


def doubles_apart(model: Any) -> int:
    """Split norms of sums of doubles, which ONNX Runtime has none of, in an ``onnx_ir`` model; how
    many there were."""
    import onnx_ir

    double = onnx_ir.DataType.DOUBLE
    joined = [n for n in model.graph.all_nodes() if n.domain == MICROSOFT and n.op_type in _NORMS]
    found = [node for node in joined if node.inputs[0].dtype == double]
    for node in found:
        _split(node)
    return len(found)


def _fits(node: Any) -> bool:
    """Whether it is a norm of a sum of which nothing reads mean or deviation, or a sum before one
    that ONNX Runtime would make such a norm of."""
    import onnx_ir

    if not node.inputs or node.inputs[0] is None or node.inputs[0].dtype != onnx_ir.DataType.FLOAT:
        return False
    if (node.domain, node.op_type) == ("", "Add"):
        uses = node.outputs[0].uses()
        return any(use.node.op_type in _NORMS.values() and use.idx == 0 for use in uses)
    if node.domain != MICROSOFT or node.op_type not in _NORMS:
        return False
    return all(not v.uses() and not v.is_graph_output() for v in node.outputs[1:3])


def _renamed(node: Any) -> None:
    node.op_type = "Sum"


def _split(node: Any) -> None:
    import onnx_ir

    x, skip, *rest = node.inputs
    scales = rest[: 2 if node.op_type == "SkipLayerNormalization" else 1]
    bias = rest[len(scales) :]
    emit = Emitter()
    summed = emit("Sum", x, skip, *(b for b in bias if b is not None))
    epsilon = node.attributes.get_float("epsilon", 1e-12)
    made = emit(_NORMS[node.op_type], summed, *scales, axis=-1, epsilon=epsilon)
    old, new = [node.outputs[0]], [made]
    if len(node.outputs) > 3:
        old, new = [*old, node.outputs[3]], [*new, summed]
    onnx_ir.convenience.replace_nodes_and_values(node.graph, node, [node], emit.nodes, old, new)
