"""An ONNX model of float32 with operators in half precision, and the same with its rounding shown.

ONNX Runtime's CPU provider computes most halves in float32, and drops the rounding between two such
operators: what a GPU would lose, or overflow at, does not show there. `explicit` makes the same
model of float32 operators with casts to the half and back behind each, which are computed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.emit.onnx_schemas import Halves, fill_types, halves_of

HIDDEN = 1e30
"""Finite numbers from here on stand for infinity, as masks have them: they become the half of the
largest number, so that two added stay finite."""
_BOUNDS = frozenset({"Clip", "Max", "Min"})


@dataclass
class Halver:
    """Makes variants of one ``onnx_ir`` model of float32; halves of its weights are made once.

    Attributes:
        half: ``onnx_ir.DataType`` FLOAT16 or BFLOAT16.
        keeps: inputs and outputs stay float32.
        nodes: by name, what can be in half precision.
        fixed: kinds of operators that cannot, though they read or give float32.
    """

    model: Any
    half: Any
    keeps: bool
    nodes: dict[str, Halves] = field(init=False)
    fixed: set[str] = field(init=False)

    def __post_init__(self) -> None:
        from onnx_ir.passes.common import LiftConstantsToInitializersPass, NameFixPass

        self.model = self.model.clone()
        NameFixPass()(self.model)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(self.model)
        fill_types(self.model)
        self.nodes, self.fixed = {}, set()
        self._tensors: dict[tuple[str, bool], Any] = {}
        self._limit = float(self.half.max)
        self._floats = {v.name for v in _top_values(self.model.graph) if _is_float(v)}
        self._beyond = {
            v.name for v in self.model.graph.initializers.values() if self._overflows(v)
        }
        opsets = dict(self.model.opset_imports)
        for node in self.model.graph:
            found = halves_of(node, opsets, self.half)
            if found is not None and not any(v and v.name in self._beyond for v in node.inputs):
                self.nodes[node.name] = found
            elif any(_is_float(v) for v in (*node.inputs, *node.outputs)):
                self.fixed.add(node.op_type)

    def kinds(self) -> dict[str, list[str]]:
        """Names of nodes that can be in half precision, by operator."""
        found: dict[str, list[str]] = {}
        for node in self.model.graph:
            if node.name in self.nodes:
                found.setdefault(node.op_type, []).append(node.name)
        return found

    def __call__(self, wide: Collection[str] = ()) -> Any:
        """The model in half precision, but for nodes of the names ``wide``."""
        twin = self.model.clone()
        graph, casts = twin.graph, _Casts(twin.graph)
        halves = {n: h for n, h in self.nodes.items() if n not in wide}
        for node in graph:
            found = halves.get(node.name)
            for index in found.outputs if found else ():
                _retype(node.outputs[index], self.half)
            if found and node.op_type == "Cast" and found.outputs:
                node.attributes["to"] = _attribute("to", int(self.half))
        if not self.keeps:
            for value in filter(_is_float, graph.inputs):
                _retype(value, self.half)
        for value in list(graph.initializers.values()):
            self._store(value, halves)
        for value in [v for v in _top_values(graph) if v.name in self._floats]:
            for user, index in [(use.node, use.idx) for use in value.uses()]:
                found = halves.get(user.name) if user.graph is graph else None
                halved = found is not None and index in found.inputs
                casts.want(value, user, index, self.half if halved else None)
        for index, value in enumerate(graph.outputs):
            if _is_float(self.model.graph.outputs[index]):
                casts.give(index, value, None if self.keeps else self.half)
        return twin

    def explicit(self, wide: Collection[str] = ()) -> Any:
        """That model, computed in float32 and rounded after each operator; it takes and gives
        float32."""
        twin = self(wide)
        graph, casts = twin.graph, _Casts(twin.graph, "shown")
        for node in [n for n in graph if n.name in self.nodes and n.name not in wide]:
            if node.op_type == "Cast":
                continue
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype == self.half:
                    casts.want(value, node, index, None)
            for index in self.nodes[node.name].outputs:
                casts.round(node.outputs[index], self.half)
        for value in [v for v in graph.inputs if v.name in self._floats and not self.keeps]:
            casts.round(value, self.half)
        for index, value in enumerate(graph.outputs):
            if value.name in self._floats:
                casts.give(index, value, None)
        return twin

    def _overflows(self, value: Any) -> bool:
        """Whether an initializer has numbers that the half has not."""
        if not _is_float(value):
            return False
        size = np.abs(value.const_value.numpy())
        return bool(((size > self._limit) & (size < HIDDEN)).any())

    def _store(self, value: Any, halves: dict[str, Halves]) -> None:
        """Make an initializer a half if a half reads it, or if it is large."""
        if not _is_float(value) or value.name in self._beyond:
            return
        users = [(use.node, use.idx) for use in value.uses()]
        read = any(n.name in halves and i in halves[n.name].inputs for n, i in users)
        if not read and value.const_value.size <= 4096:
            return
        bound = all(node.op_type in _BOUNDS for node, _ in users)
        key = value.name, bound
        if key not in self._tensors:
            self._tensors[key] = self._rounded(value.const_value, bound=bound)
        value.const_value = self._tensors[key]
        _retype(value, self.half)

    def _rounded(self, tensor: Any, *, bound: bool) -> Any:
        import onnx_ir

        numbers = tensor.numpy()
        most = self._limit if bound else self._limit / 2
        hidden = np.isfinite(numbers) & (np.abs(numbers) >= HIDDEN)
        made = np.where(hidden, np.copysign(most, numbers), numbers).astype(self.half.numpy())
        if made.size == 1 and not made.any() and numbers.any():  # such as an epsilon
            made = np.full_like(made, np.copysign(_least(self.half), numbers))
        return onnx_ir.tensor(made, dtype=self.half, name=tensor.name)


class _Casts:
    """Casts of values of a graph, one for each dtype that is read of a value."""

    def __init__(self, graph: Any, tag: str = "cast") -> None:
        self.graph, self.tag, self.made = graph, tag, dict[tuple[Any, Any], Any]()

    def want(self, value: Any, user: Any, index: int, half: Any | None) -> None:
        """Let a node read a float as ``half``, or as float32."""
        if value.dtype != (half or _float()):
            user.replace_input_with(index, self._cast(value, half or _float()))

    def give(self, index: int, value: Any, half: Any | None) -> None:
        """Let an output of the graph, whose name it keeps, be ``half``, or float32."""
        if value.dtype == (half or _float()):
            return
        made = self._cast(value, half or _float())
        value.name, made.name = f"{value.name}.{value.dtype.name}.uncast", value.name
        made.shape = value.shape
        self.graph.outputs[index] = made

    def round(self, value: Any, half: Any) -> None:
        """Compute a value in float32, and let what reads it read it rounded."""
        _retype(value, _float())
        users = [(use.node, use.idx) for use in value.uses()]
        made = self._cast(value, half)
        for user, index in users:
            user.replace_input_with(index, made)
        for index, output in enumerate(self.graph.outputs):
            if output is value:
                value.name, made.name = f"{value.name}.unrounded", value.name
                self.graph.outputs[index] = made

    def _cast(self, value: Any, dtype: Any) -> Any:
        import onnx_ir

        key = value, dtype
        if key not in self.made:
            name = f"{value.name}.{self.tag}.{dtype.name}"
            node = onnx_ir.node("Cast", [value], {"to": int(dtype)}, name=name)
            made = self.made[key] = node.outputs[0]
            made.name, made.shape = name, value.shape
            made.type = onnx_ir.TensorType(dtype)
            before = value.producer()
            if before is not None:
                self.graph.insert_after(before, node)
            elif len(self.graph):
                self.graph.insert_before(self.graph[0], node)
        return self.made[key]


def _least(half: Any) -> float:
    """The smallest number above zero."""
    import ml_dtypes

    return float(ml_dtypes.finfo(half.numpy()).smallest_subnormal)


def _float() -> Any:
    import onnx_ir

    return onnx_ir.DataType.FLOAT


def _is_float(value: Any) -> bool:
    return value is not None and value.dtype == _float()


def _retype(value: Any, dtype: Any) -> None:
    import onnx_ir

    value.type = onnx_ir.TensorType(dtype)


def _attribute(name: str, value: int) -> Any:
    import onnx_ir

    return onnx_ir.AttrInt64(name, value)


def _top_values(graph: Any) -> list[Any]:
    """Values of the outer graph, which bodies of its nodes may read too."""
    made = [value for node in graph for value in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *made]
