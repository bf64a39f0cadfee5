"""Sizes in a Dynamo graph: which are equal, and where they are read.

Dynamo reads the sizes of a view off the value that is viewed. A value that only lends its size
would count as needed (logits, of which a loss is all that anybody wants). `torch.export` reads
sizes off inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from graphopt.analysis.axis_rules.sizes import size_of
from graphopt.program import val

aten = torch.ops.aten


_INDEXED = frozenset(
    {aten.gather.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default}
)


def guard_indexed_sizes(graph: fx.Graph) -> None:
    """Sizes of an index are those of what it indexes, where they are in the call at hand.

    A ``gather`` may read fewer rows than there are, so that nothing in the graph says that logits
    have as many as labels. Said to Dynamo, it becomes a guard: another call compiles again.
    """
    numbers = {s: _number(*place) for s, place in _known(graph).items()}
    for node in graph.nodes:
        if node.target in _INDEXED:
            tensor, dim, index = (val(a) for a in node.args[:3])
            for axis, sizes in enumerate(zip(tensor.shape, index.shape, strict=True)):
                if axis != dim % tensor.dim():
                    _guard_equal(*sizes, numbers)


def _guard_equal(one: Any, other: Any, numbers: Mapping[sympy.Symbol, Any]) -> None:
    """Two symbols, where the sizes differ by them: then one replaces the other everywhere."""
    difference = size_of(one) - size_of(other)
    if isinstance(difference, int):
        return
    symbols = sorted(difference.free_symbols & numbers.keys(), key=str)
    if len(symbols) == 2 and difference in (symbols[0] - symbols[1], symbols[1] - symbols[0]):
        one, other = (numbers[s] for s in symbols)
    guard_or_false(one == other)  # sizes that values decide are no guard


def read_sizes_off_inputs(graph: fx.Graph) -> None:
    """``f(x).shape[d] = x.shape[e] + c``, wherever an input has that size but for a number."""
    known = _known(graph)
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        extent: Any = size_of(val(node))
        if isinstance(extent, int) or node.args[0].op == "placeholder":
            continue
        more, symbol = extent.as_coeff_Add()
        if symbol in known and more.is_Integer:
            with graph.inserting_before(node):
                node.replace_all_uses_with(_sum(graph, node, known[symbol], int(more)))
            graph.erase_node(node)


def _known(graph: fx.Graph) -> dict[sympy.Symbol, tuple[fx.Node, int | None]]:
    """For each symbol an input that is this number, or one of this size along a dim."""
    found: dict[sympy.Symbol, tuple[fx.Node, int | None]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = val(node)
        if isinstance(value, Tensor):
            for dim, size in enumerate(value.shape):
                found.setdefault(size_of(size), (node, dim))
        elif isinstance(value, torch.SymInt):
            found.setdefault(size_of(value), (node, None))
    return {k: v for k, v in found.items() if isinstance(k, sympy.Symbol)}


def _sum(graph: fx.Graph, node: fx.Node, source: tuple[fx.Node, int | None], more: int) -> fx.Node:
    """The size of an input, and what is to be added."""
    size, dim = source
    value = _number(size, dim)
    if dim is not None:
        size = _made(graph, node, aten.sym_size.int, (size, dim), value)
    return _made(graph, node, operator.add, (size, more), value + more) if more else size


def _number(node: fx.Node, dim: int | None) -> Any:
    """An input, or its size along a dim."""
    return val(node) if dim is None else val(node).shape[dim]


def _made(graph: fx.Graph, node: fx.Node, target: Any, args: Any, value: Any) -> fx.Node:
    made = graph.call_function(target, args)
    made.meta = {**node.meta, "val": value}
    return made
