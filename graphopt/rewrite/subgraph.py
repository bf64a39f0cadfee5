"""Cutting the few nodes of a rewrite out as a function of their own, to measure them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.program import Program, is_random, val


@dataclass(frozen=True)
class Subgraph:
    """A piece of a program as a callable.

    Attributes:
        root: module that holds what ``get_attr`` nodes name.
        graph: takes the boundary values in the order of ``inputs``; returns a tuple.
        sources: boundary nodes in the program the piece was cut from.
        state: tensors behind those boundary nodes that are state, by node name.
        names: original name -> node of ``graph``, for every computing node.
    """

    root: fx.GraphModule
    graph: fx.Graph
    sources: tuple[fx.Node, ...]
    state: Mapping[str, Tensor]
    names: Mapping[str, fx.Node]

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the boundary nodes."""
        return tuple(n.name for n in self.sources)

    @property
    def activations(self) -> tuple[str, ...]:
        """Boundary inputs that are not state."""
        return tuple(n for n in self.inputs if n not in self.state)

    @cached_property
    def module(self) -> fx.GraphModule:
        """The piece as generated code."""
        return fx.GraphModule(self.root, self.graph)

    @cached_property
    def wide(self) -> Subgraph:
        """The same computation with every floating dtype argument widened to float64."""
        return replace(self, graph=widen(self.graph))

    @cached_property
    def structure(self) -> str:
        """Hash of operators, literals, shapes and dtypes: equal pieces take equal time."""
        index = {n: f"%{i}" for i, n in enumerate(self.graph.nodes)}
        lines = []
        for node in self.graph.nodes:
            args = fx.node.map_arg((node.args, node.kwargs), index.__getitem__)
            target = "" if node.op == "placeholder" else node.target
            lines.append(f"{node.op} {target} {args} {_kind(node)}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def extract(
    program: Program, outputs: list[Any], within: set[fx.Node], like: Subgraph | None = None
) -> Subgraph:
    """Cut out what ``outputs`` need of the nodes in ``within``; everything else becomes an input.

    Args:
        like: a piece whose boundary inputs come first, in its order.
    """
    needed, boundary = _closure(outputs, within)
    order = tuple(dict.fromkeys((*(like.sources if like else ()), *boundary)))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in order:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta["val"] = val(node)
    for node in needed:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(fx.node.map_arg(list(outputs), copies.__getitem__)))
    held = {n.name: program.target_of(n) for n in order}
    state = {name: program.state[t] for name, t in held.items() if t is not None}
    names = {n.name: copies[n] for n in needed}
    return Subgraph(program.graph_module, graph, order, state, names)


def _closure(outputs: list[Any], within: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Nodes of ``within`` that the outputs need, in topological order, and their boundary."""
    done: dict[fx.Node, None] = {}
    boundary: dict[fx.Node, None] = {}
    stack = [(n, False) for n in reversed(outputs) if isinstance(n, fx.Node)]
    while stack:
        node, children_done = stack.pop()
        if node not in within:
            boundary.setdefault(node)
        elif children_done:
            done.setdefault(node)
        elif node not in done:
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.all_input_nodes))
    return list(done), list(boundary)


DROPOUT_P = {
    torch.ops.aten.dropout.default: 1,
    torch.ops.aten.native_dropout.default: 1,
    torch.ops.aten.feature_dropout.default: 1,
    torch.ops.aten.scaled_dot_product_attention.default: 4,
}
"""Operators that draw a dropout mask -> position of the probability."""


def widen(source: fx.Graph) -> fx.Graph:
    """A copy whose floating dtype arguments are all float64: the reference a rewrite is held to.

    What is asserted of dtypes is left out: complex values stay as they are, and so do their parts.
    Random operators draw in their own dtype, so that they draw the same numbers, and quantized
    weights stay as they are stored.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        if is_random(node) and node.target not in DROPOUT_P:
            copies[node] = _draw(graph, node, copies)
            continue
        if getattr(node.target, "_opname", "").startswith("quantized_"):
            copies[node] = _stored(graph, node, copies)
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        checks = node.target is torch.ops.aten._assert_tensor_metadata.default
        change = _without_dtypes if checks else _widened
        if getattr(node.target, "namespace", "") == "graphopt":
            change = _widened_words
        copies[node].args = change(copies[node].args)
        copies[node].kwargs = change(copies[node].kwargs)
        copies[node].target = _IN_FLOAT64.get(node.target, node.target)
    return graph


def _grouped_mm(
    rows: Tensor,
    weights: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``aten._grouped_mm`` of rows ``(S, K)`` and weights ``(E, K, N)``."""
    if rows.dim() != 2 or weights.dim() != 3 or offs is None:
        return torch._grouped_mm(rows, weights, offs=offs, bias=bias, out_dtype=out_dtype)
    ends = offs.tolist()
    bounds = zip([0, *ends], ends, strict=False)
    parts = [rows[a:b] @ weight for (a, b), weight in zip(bounds, weights, strict=True)]
    rest = rows.new_zeros((len(rows) - ends[-1], weights.shape[2]))
    made = torch.cat((*parts, rest))
    return made if bias is None else made + bias


_IN_FLOAT64: dict[Any, Any] = {torch.ops.aten._grouped_mm.default: _grouped_mm}
"""Operators that take no float64, and what computes the same."""


def _draw(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A random operator on inputs in their own dtypes; its result is widened."""
    narrow = partial(_narrow, graph, copies)
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), narrow)
    made, value = graph.call_function(node.target, args, kwargs), val(node)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return made
    if any(a.name == "dtype" for a in node.target._schema.arguments):
        made.kwargs = {**made.kwargs, "dtype": value.dtype}
    return graph.call_function(torch.ops.aten.to.dtype, (made, torch.float64))


def _stored(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """An operator on a quantized weight, which is stored in dtypes of its own, and a wide input."""
    first, *others = node.args
    narrow = partial(_narrow, graph, copies)
    args, kwargs = fx.node.map_arg((tuple(others), dict(node.kwargs)), narrow)
    given = fx.node.map_arg(first, copies.__getitem__)
    return graph.call_function(node.target, (given, *_widened(args)), _widened(kwargs))


def _narrow(graph: fx.Graph, copies: Mapping[fx.Node, fx.Node], argument: fx.Node) -> fx.Node:
    """A value of the original in its own dtype."""
    value = val(argument)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return copies[argument]
    return graph.call_function(torch.ops.aten.to.dtype, (copies[argument], value.dtype))


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Floating tensors that an operator makes without being told a dtype are float64 inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _widened(structure: Any) -> Any:
    if isinstance(structure, torch.dtype):
        return torch.float64 if structure.is_floating_point else structure
    if isinstance(structure, dict):
        return {k: _widened(v) for k, v in structure.items()}
    if isinstance(structure, list | tuple):
        return type(structure)(_widened(v) for v in structure)
    return structure


def _widened_words(structure: Any) -> Any:
    """As `_widened`, in operators that spell dtypes in a text."""
    if isinstance(structure, str):
        return _FLOATING.sub("torch.float64", structure)
    if isinstance(structure, dict):
        return {k: _widened_words(v) for k, v in structure.items()}
    if isinstance(structure, list | tuple):
        return type(structure)(_widened_words(v) for v in structure)
    return structure


_FLOATING = re.compile(r"\btorch\.(float16|bfloat16|float32)\b")


def _without_dtypes(structure: Any) -> Any:
    if isinstance(structure, dict):
        return {k: _without_dtypes(v) for k, v in structure.items()}
    if isinstance(structure, tuple):
        return tuple(_without_dtypes(v) for v in structure)
    return None if isinstance(structure, torch.dtype) else structure


def _kind(node: fx.Node) -> str:
    value = val(node)
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else str(value)
