"""Weights that a file holds several times, stored once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.emit.onnx_tensors import bits_of, tensor_key, tensors_equal
from graphopt.onnx_files.document import names_inside, tensor_bytes
from graphopt.onnx_files.steps import Allowed, Change, OnnxPass, Outcome, Surroundings

TURNED_FROM = 4096
"""Bytes of a matrix from which on it is stored as the transposition of another."""


@dataclass(frozen=True)
class MergeInitializers(OnnxPass):
    """Constants of equal type, shape and bits are one; transposed copies of a matrix are a
    ``Transpose`` of it, which ONNX Runtime computes once, on loading."""

    def apply(self, model: Any, around: Surroundings, allowed: Allowed) -> Outcome:  # noqa: ARG002
        merger = _Merger(model, self, allowed)
        merger.run()
        return merger.outcome


class _Merger:
    def __init__(self, model: Any, owner: MergeInitializers, allowed: Allowed) -> None:
        self.model, self.owner, self.allowed = model, owner, allowed
        self.outcome = Outcome()
        self.kept: dict[Any, list[Any]] = {}
        self.inner = names_inside(model)

    def run(self) -> None:
        for value, tensor in _constants(self.model):
            if value.is_graph_input():
                self._missed(value, "callers may override it, as it is an input too")
            elif value.is_graph_output():
                self._missed(value, "it is an output of its graph too")
            elif value.uses() and not self._merge(value, tensor):
                self.kept.setdefault(tensor_key(tensor), []).append(value)
        self._turn()

    def _merge(self, value: Any, tensor: Any) -> bool:
        """Whether an equal one takes its place."""
        for other in self.kept.get(tensor_key(tensor), ()):
            if not tensors_equal(_tensor(other), tensor):
                continue
            if other.name in self.inner and _graph_of(other) is not _graph_of(value):
                self._missed(value, f"a subgraph has another value named `{other.name}`")
                return False
            if not self.allowed(str(value.name)):
                return False
            value.replace_all_uses_with(other)
            _drop(value)
            change = (str(value.name), "merge equal constants", (str(value.name),))
            self.outcome.changes.append(Change(*change, (str(other.name),), bitwise=True))
            return True
        return False

    def _turn(self) -> None:
        """Matrices of the main graph that are others transposed."""
        graph = self.model.graph
        held = {id(v) for v in graph.initializers.values()}
        plain = [v for values in self.kept.values() for v in values if id(v) in held]
        matrices = [v for v in plain if _turns(_tensor(v))]
        first: dict[Any, Any] = {}
        for value in matrices:
            tensor = _tensor(value)
            other = first.get(tensor_key(tensor, turned=True))
            if other is None or other.name in self.inner:
                first.setdefault(tensor_key(tensor), value)
                continue
            equal = np.array_equal(bits_of(_tensor(other)).T, bits_of(tensor))
            if equal and self.allowed(str(value.name)):
                self._as_transposition(value, other)

    def _as_transposition(self, value: Any, other: Any) -> None:
        import onnx_ir

        graph = self.model.graph
        node = onnx_ir.node("Transpose", [other], {"perm": [1, 0]})
        made, name = node.outputs[0], str(value.name)
        made.type, made.shape = value.type, value.shape
        value.replace_all_uses_with(made)
        del graph.initializers[name]
        made.name, node.name = name, f"{name}.turned"
        first = next(iter(graph), None)
        graph.append(node) if first is None else graph.insert_before(first, node)
        change = Change(name, "store as a transposition", (name,), (str(other.name),), True)
        self.outcome.changes.append(change)

    def _missed(self, value: Any, reason: str) -> None:
        """Told where there is an equal one."""
        tensor = _tensor(value)
        alike = self.kept.get(tensor_key(tensor), ())
        if any(tensors_equal(_tensor(other), tensor) for other in alike):
            found = self.owner.missed("merge equal constants", reason, str(value.name))
            self.outcome.missed.append(found)


def _constants(model: Any) -> Iterator[tuple[Any, Any]]:
    """Initializers, then results of ``Constant``, of the main graph, then those of subgraphs."""
    for graph in [model.graph, *(g for g in model.graphs() if g is not model.graph)]:
        values = [v for v in list(graph.initializers.values()) if v.const_value is not None]
        values += [n.outputs[0] for n in graph if _is_constant(n)]
        yield from ((value, _tensor(value)) for value in values)


def _is_constant(node: Any) -> bool:
    given = node.attributes.get("value") if node.op_type == "Constant" else None
    return given is not None and not node.domain and not given.is_ref()


def _tensor(value: Any) -> Any:
    node = value.producer()
    return value.const_value if node is None else node.attributes["value"].as_tensor()


def _graph_of(value: Any) -> Any:
    return value.graph


def _drop(value: Any) -> None:
    node, graph = value.producer(), value.graph
    if node is not None:
        node.graph.remove(node, safe=True)
    elif graph is not None:
        del graph.initializers[value.name]


def _turns(tensor: Any) -> bool:
    """A matrix worth a node, of whole bytes."""
    if tensor.dtype.name == "STRING" or tensor.dtype.bitwidth not in (8, 16, 32, 64):
        return False
    return len(tensor.shape) == 2 and min(tensor.shape) > 1 and tensor_bytes(tensor) >= TURNED_FROM
