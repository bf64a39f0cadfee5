"""Weights that are read twice are held once: as rows of an embedding, and as the head's product.

``x W^T`` of a weight that is read as it is too comes out of translation as a product with the
weight transposed, in a second copy (of the file, or made by ONNX Runtime at load). ``Gemm`` reads
``W`` as it lies, and only packs a copy of its own, which ``session.disable_prepacking`` keeps it
from. For a weight of 49,152x576 a session takes 118 MB instead of 226. A weight that is no
constant is not packed by any session: `unpacked` gives it to ``Gemm`` through a reshape to its own
shape, which depends on the inputs as far as ONNX Runtime can tell, and which copies nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from graphopt.emit.onnx_quantized.emitter import MICROSOFT, Emitter
from graphopt.emit.onnx_tensors import tensor_key, tensors_equal

ONE_COPY = {"session.disable_prepacking": "1"}
"""Entries of a session's configuration with which it holds tied weights once."""


class _Product(NamedTuple):
    """``node`` computes ``x W^T``, ``weight`` is ``W`` of ``(V, D)``."""

    node: Any
    x: Any
    weight: Any


def merge_equal(model: Any) -> int:
    """Make initializers of equal values one, in place, in an ``onnx_ir`` model; how many went.

    Equal is what has the same bytes, dtype and shape: zeros of two signs stay apart.
    """
    return sum(_merged(graph) for graph in model.graphs())


def _merged(graph: Any) -> int:
    known: dict[Any, list[Any]] = {}
    before = len(graph.initializers)
    for value in list(graph.initializers.values()):
        held = value.const_value
        if held is None or value.is_graph_input() or value.is_graph_output():
            continue
        alike = known.setdefault(tensor_key(held), [])
        twin = next((other for other in alike if tensors_equal(other.const_value, held)), None)
        if twin is None:
            alike.append(value)
            continue
        value.replace_all_uses_with(twin)
        del graph.initializers[value.name]
    return before - len(graph.initializers)


def tied_products(program: Any) -> Any | None:
    """A copy of a `torch.onnx.ONNXProgram` whose products with weights that are read elsewhere too
    are ``Gemm`` of rows; None where there is none."""
    twin, emit = _twin(program)
    graph = twin.model.graph
    found = list(_products(graph))
    for product in found:
        _rewrite(product, emit)
    _register(emit, graph)
    _drop_unread(graph)
    if not any(node.domain == MICROSOFT for node in graph.all_nodes()):
        twin.model.opset_imports.pop(MICROSOFT, None)
    return twin if found else None


def tied_weights(model: Any) -> list[str]:
    """Initializers of an ``onnx_ir`` model that ``Gemm`` transposes and something else reads."""
    return list(dict.fromkeys(node.inputs[1].name for node in _tied_gemms(model.graph)))


def _tied_gemms(graph: Any) -> list[Any]:
    gemms = (node for node in graph if (node.domain, node.op_type) == ("", "Gemm"))
    turned = (node for node in gemms if node.attributes.get_int("transB", 0))
    return [node for node in turned if _if_shared(node.inputs[1], graph) is not None]


def unpacked(program: Any) -> Any:
    """A copy of a `torch.onnx.ONNXProgram` whose tied products read weights that are no constants.

    ``Gemm(x, Reshape(W, 0 * Shape(x)), transB=1)``: a size of 0 stands for that of the weight.
    """
    twin, emit = _twin(program)
    graph = twin.model.graph
    for node in _tied_gemms(graph):
        start = len(emit.nodes)
        sizes = emit("Mul", emit("Shape", node.inputs[0]), emit.numbers(0, 0))
        weight = emit("Reshape", node.inputs[1], sizes)
        weight.type, weight.shape = node.inputs[1].type, node.inputs[1].shape
        node.replace_input_with(1, weight)
        graph.insert_before(node, emit.nodes[start:])
    _register(emit, graph)
    return twin


def _twin(program: Any) -> tuple[Any, Emitter]:
    """A copy of a `torch.onnx.ONNXProgram`, and what makes nodes for it beside its constants."""
    twin, emit = copy.copy(program), Emitter()
    twin.model = program.model.clone()
    emit.constants.update(twin.model.graph.initializers)
    return twin, emit


def _register(emit: Emitter, graph: Any) -> None:
    """Constants that were made become initializers."""
    for name, value in emit.constants.items():
        if name not in graph.initializers:
            graph.register_initializer(value)


def _products(graph: Any) -> Iterator[_Product]:
    for node in graph:
        weight = _weight(node, graph)
        if weight is not None and (shape := node.inputs[0].shape) is not None and len(shape) > 1:
            yield _Product(node, node.inputs[0], weight)


def _weight(node: Any, graph: Any) -> Any | None:
    """The weight ``(V, D)`` that a product has transposed on its right, if it is read elsewhere."""
    if (node.domain, node.op_type) == (MICROSOFT, "FusedMatMul"):
        return _if_shared(node.inputs[1], graph) if _only_transposes(node) else None
    if (node.domain, node.op_type) != ("", "MatMul"):
        return None
    before = node.inputs[1].producer()
    if before is None:
        return _counterpart(node.inputs[1], graph)
    turned = before.op_type == "Transpose" and before.attributes.get_ints("perm", ()) == (1, 0)
    return _if_shared(before.inputs[0], graph) if turned else None


def _only_transposes(node: Any) -> bool:
    """Whether a ``FusedMatMul`` is ``x W^T``, and no more than that."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = given.pop("transB", 0) == 1 and given.pop("alpha", 1.0) == 1.0
    return plain and not any(given.values())


def _if_shared(weight: Any, graph: Any) -> Any | None:
    stored = weight.name in graph.initializers and len(weight.shape) == 2
    return weight if stored and len(weight.uses()) > 1 else None


def _counterpart(right: Any, graph: Any) -> Any | None:
    """The initializer that the right side is the transpose of: the exporter folds small ones."""
    held = right.const_value
    if right.name not in graph.initializers or len(held.shape) != 2:
        return None
    wanted = held.numpy().T
    for value in graph.initializers.values():
        other = value.const_value
        if value is right or not value.uses() or other.dtype != held.dtype:
            continue
        if tuple(other.shape) == wanted.shape and np.array_equal(other.numpy(), wanted):
            return value
    return None


def _rewrite(product: _Product, emit: Emitter) -> None:
    """``Reshape(Gemm(Reshape(x, [-1, D]), W, transB=1), [*x.shape[:-1], V])``."""
    import onnx_ir

    node, x, weight = product
    classes, width = map(int, weight.shape)
    start, rank = len(emit.nodes), len(x.shape)
    rows = x if rank == 2 else emit("Reshape", x, emit.numbers(-1, width))
    made = emit("Gemm", rows, weight, transB=1)
    if rank > 2:
        sizes = emit("Concat", emit("Shape", x, end=-1), emit.numbers(classes), axis=0)
        made = emit("Reshape", made, sizes, allowzero=1)
    onnx_ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], emit.nodes[start:], [node.outputs[0]], [made]
    )


def _drop_unread(graph: Any) -> None:
    """Transposes that nothing reads any more, and initializers."""
    for node in list(graph):
        if node.op_type == "Transpose" and not any(_read(value) for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not _read(value):
            del graph.initializers[name]


def _read(value: Any) -> bool:
    return bool(value.uses()) or value.is_graph_output()
