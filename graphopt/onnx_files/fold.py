"""Constants computed ahead of time, by ONNX Runtime itself, where the file does not grow by it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.onnx_files.document import tensor_bytes
from graphopt.onnx_files.random_nodes import STANDARD, is_deterministic
from graphopt.onnx_files.steps import Allowed, Change, OnnxPass, Outcome, Surroundings, label
from graphopt.onnx_files.values import run

LARGEST = 64 << 20
"""Bytes of a value that is computed ahead of time, at most: between two others too."""
_KEPT = frozenset({"Constant", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
"""``Constant`` is one already; the others say how a weight is stored."""


@dataclass(frozen=True)
class FoldConstants(OnnxPass):
    """Operators on constants alone are computed ahead of time, unless the file grows by it."""

    def apply(self, model: Any, around: Surroundings, allowed: Allowed) -> Outcome:  # noqa: ARG002
        return _Folder(model, self, allowed).run()


class _Folder:
    """Computes what is constant, then decides which of it is stored."""

    def __init__(self, model: Any, owner: FoldConstants, allowed: Allowed) -> None:
        self.model, self.graph, self.owner, self.allowed = model, model.graph, owner, allowed
        self.known: dict[Any, Any] = {}
        self.outcome = Outcome()

    def run(self) -> Outcome:
        for node in self.graph:
            if self._folds(node):
                self._compute(node)
        for value in [v for v in self.known if self._is_read(v)]:
            self._store(value)
        return self.outcome

    def _folds(self, node: Any) -> bool:
        """Whether it is an operator of the standard that reads constants alone."""
        if node.domain not in STANDARD or node.op_type in _KEPT or len(node.outputs) != 1:
            return False
        if not is_deterministic(node, self.model.functions) or _has_graphs(node):
            return False
        given = [v for v in node.inputs if v is not None]
        return all(self._is_small(v) for v in given) and node.outputs[0].name != ""

    def _is_small(self, value: Any) -> bool:
        tensor = self._tensor(value)
        return tensor is not None and tensor_bytes(tensor) <= LARGEST

    def _tensor(self, value: Any) -> Any:
        """What a value is known to be; None for what callers may override."""
        if value in self.known:
            return self.known[value]
        node = value.producer()
        if node is None:
            fixed = value.is_initializer() and not value.is_graph_input()
            return value.const_value if fixed else None
        given = node.attributes.get("value")
        if node.op_type != "Constant" or node.domain or given is None or given.is_ref():
            return None
        return given.as_tensor()

    def _compute(self, node: Any) -> None:
        try:
            array = _evaluated(self.model, node, [v and self._tensor(v) for v in node.inputs])
        except Exception as error:  # a runtime in C++ raises anything
            self._missed(node, f"ONNX Runtime does not compute it by itself: {_line(error)}")
            return
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
            return
        if array.nbytes > LARGEST:
            self._missed(node, f"its value takes {array.nbytes} bytes, over {LARGEST}")
            return
        import onnx_ir

        self.known[node.outputs[0]] = onnx_ir.tensor(array, name=node.outputs[0].name)

    def _is_read(self, value: Any) -> bool:
        """Whether anything but what is folded itself reads it."""
        readers = [use.node for use in value.uses()]
        folded = all(len(n.outputs) == 1 and n.outputs[0] in self.known for n in readers)
        return not value.is_graph_output() and not (readers and folded)

    def _store(self, value: Any) -> None:
        import onnx_ir

        node = value.producer()
        gone = _alone(value)
        freed = sum(map(self._bytes, gone))
        held = onnx_ir.serde.serialize_tensor(self.known[value]).ByteSize()
        if held > freed:
            self._missed(node, f"the file would grow by {held - freed} bytes")
            return
        name = str(value.name)
        if not self.allowed(name):
            return
        names = tuple(label(n) for n in gone if hasattr(n, "op_type"))
        tensor = self.known.pop(value)
        made = onnx_ir.Value(
            name=name,
            type=onnx_ir.TensorType(tensor.dtype),
            shape=onnx_ir.Shape(tensor.shape),
            const_value=tensor,
        )
        value.replace_all_uses_with(made)
        value.name = f"{name}.folded"
        self.graph.register_initializer(made)
        for item in gone:
            self._remove(item)
        self.outcome.changes.append(Change(name, f"fold {node.op_type}", names, (name,), True))

    def _bytes(self, item: Any) -> int:
        """What a node or an initializer takes in the file."""
        import onnx_ir

        if hasattr(item, "op_type"):
            return int(onnx_ir.serde.serialize_node(item).ByteSize())
        return tensor_bytes(item.const_value) + len(str(item.name))

    def _remove(self, item: Any) -> None:
        if hasattr(item, "op_type"):
            self.known.pop(item.outputs[0], None)
            self.graph.remove(item, safe=True)
        else:
            del self.graph.initializers[item.name]

    def _missed(self, node: Any, reason: str) -> None:
        self.outcome.missed.append(self.owner.missed(f"fold {node.op_type}", reason, label(node)))


def _alone(value: Any) -> list[Any]:
    """Nodes and initializers that nothing needs once ``value`` is stored, readers first."""
    found: list[Any] = [value.producer()]
    for node in found:
        if not hasattr(node, "op_type"):
            continue
        for given in dict.fromkeys(v for v in node.inputs if v is not None):
            readers = {id(use.node) for use in given.uses()}
            if given.is_graph_output() or not readers <= {id(item) for item in found}:
                continue
            source = given.producer()
            if source is None and not given.is_graph_input() and given.graph is node.graph:
                found.append(given)
            elif source is not None and len(source.outputs) == 1 and source not in found:
                found.append(source)
    return found


def _evaluated(model: Any, node: Any, tensors: list[Any]) -> Any:
    """What a node computes of constants, as ONNX Runtime computes it."""
    import onnx_ir

    from graphopt.emit.onnx_runtime import open_session

    given: dict[int, Any] = {}
    inputs: list[Any] = []
    for value, tensor in zip(node.inputs, tensors, strict=True):
        if value is not None and id(value) not in given:
            given[id(value)] = onnx_ir.Value(
                name=f"c{len(given)}",
                type=onnx_ir.TensorType(tensor.dtype),
                shape=onnx_ir.Shape(tensor.shape),
                const_value=_inline(tensor),
            )
        inputs.append(None if value is None else given[id(value)])
    twin = onnx_ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=1)
    twin.outputs[0].name = "y"
    graph = onnx_ir.Graph(
        [],
        twin.outputs,
        nodes=[twin],
        initializers=list(given.values()),
        opset_imports=dict(model.opset_imports),
        name="constant",
    )
    made = onnx_ir.Model(graph, ir_version=model.ir_version)
    session = open_session(onnx_ir.serde.serialize_model(made).SerializeToString())
    return run(session, {})[0]


def _inline(tensor: Any) -> Any:
    """The tensor without its file."""
    import onnx_ir

    if not isinstance(tensor, onnx_ir.ExternalTensor):
        return tensor
    return onnx_ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def _has_graphs(node: Any) -> bool:
    return any("GRAPH" in a.type.name for a in node.attributes.values())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def unfolded(model: Any) -> Iterator[Any]:
    """Nodes of the main graph that read constants alone, and are none."""
    folder = _Folder(model, FoldConstants(), lambda _key: True)
    for node in model.graph:
        given = [v for v in node.inputs if v is not None]
        if (
            node.op_type not in _KEPT
            and given
            and all(folder._tensor(v) is not None for v in given)
        ):
            yield node
