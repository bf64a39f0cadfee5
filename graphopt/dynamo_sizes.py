"""Sizes in a Dynamo graph are read off its inputs, as `torch.export` has them.

Dynamo reads the sizes of a view off the value that is viewed. A value that only lends its size
would count as needed (logits, of which a loss is all that anybody wants).
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphopt.analysis.axis_rules.sizes import size_of
from graphopt.program import val

aten = torch.ops.aten


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
    value = val(size) if dim is None else val(size).shape[dim]
    if dim is not None:
        size = _made(graph, node, aten.sym_size.int, (size, dim), value)
    return _made(graph, node, operator.add, (size, more), value + more) if more else size


def _made(graph: fx.Graph, node: fx.Node, target: Any, args: Any, value: Any) -> fx.Node:
    made = graph.call_function(target, args)
    made.meta = {**node.meta, "val": value}
    return made
