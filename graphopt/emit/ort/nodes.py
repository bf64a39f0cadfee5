"""Which nodes may be given to ONNX Runtime at all, by what they are; the rest is tried."""

from __future__ import annotations

from collections.abc import Iterable
from operator import getitem
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from graphopt.analysis.aliases import is_view
from graphopt.analysis.flow import is_ordered
from graphopt.emit.ort.programs import places, symbols_in
from graphopt.program import Program, compute_nodes, is_mutating, val
from graphopt.rewrite import arguments
from graphopt.rewrite.subgraph import DROPOUT_P


def refusals(program: Program, device: torch.device) -> dict[fx.Node, str]:
    """Why nodes must stay in torch, for those that must whatever ONNX Runtime says.

    Args:
        program: sizes stand on its inputs (`programs.root_sizes`).
        device: whose memory the provider reads.
    """
    sizes = set(places(program.user_inputs()))
    found = {}
    for node in compute_nodes(program.graph):
        if (why := _refusal(node, sizes, device)) is not None:
            found[node] = why
    return found


def _refusal(node: fx.Node, sizes: set[sympy.Symbol], device: torch.device) -> str | None:
    if node.target is getitem:
        return None  # stays with what it is an item of
    if isinstance(val(node), torch.SymInt | torch.SymFloat | torch.SymBool):
        return SIZES
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return "runs code of its own"
    if is_ordered(node) and not _keeps_all(node):
        return "draws random numbers, which torch's generator has to give"
    if is_mutating(node.target):
        return "writes its input"
    values = [val(node), *map(val, node.all_input_nodes)]
    if not list(_tensors([values[0]])):
        return NO_TENSOR
    if why := next(filter(None, (_unfit(t, device) for t in _tensors(values))), None):
        return why
    if not all(symbols_in(v) <= sizes for v in values):
        return "its sizes depend on values, or are numbers that the call gives"
    others = [v for v in values[1:] if not isinstance(v, Tensor | list | tuple | torch.SymInt)]
    return "reads a Python value of the call" if others else None


def _keeps_all(node: fx.Node) -> bool:
    """Whether it would draw a dropout mask, and its probability is 0."""
    if node.target not in DROPOUT_P:
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return arguments(node)[names[DROPOUT_P[node.target]]] == 0


SIZES = "computes with sizes, in Python"
NO_TENSOR = "gives no tensor"
VIEWS = "gives views of what torch holds or returns, which take no time"


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _unfit(value: Tensor, device: torch.device) -> str | None:
    if value.is_complex():
        return "computes with complex numbers, which ONNX has no type for"
    if value.layout is not torch.strided:
        return f"reads or makes a tensor of layout {value.layout}"
    if (value.device.type, value.device.index or 0) != (device.type, device.index or 0):
        return f"is on {value.device}, and the execution provider reads memory of {device}"
    return None


def shares_memory(node: fx.Node) -> bool:
    """Whether a node gives its input, or a view of it, and computes nothing."""
    if node.target is getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and shares_memory(source)
    if not node.all_input_nodes or not is_view(node):
        return False
    made, read = next(iter(_tensors([val(node)])), None), val(node.all_input_nodes[0])
    return made is not None and isinstance(read, Tensor) and made.dtype == read.dtype


def return_views_apart(program: Program) -> None:
    """Give outputs that are views of something views of their own, in place.

    They stay in torch then, where an output that shows the memory of an input or of another output
    goes on to do so, though the same view is computed with in ONNX Runtime.
    """
    output = program.output_node()
    for node in list(output.all_input_nodes):
        if shares_memory(node) and len(node.users) > 1:
            output.replace_input_with(node, _copied(node, output))
    program.recompile()


def _copied(view: fx.Node, anchor: fx.Node) -> fx.Node:
    """The same view once more, before ``anchor``, of what it is a view of."""
    source = view.all_input_nodes[0]
    copies = {source: _copied(source, anchor)} if shares_memory(source) else {}
    with view.graph.inserting_before(anchor):
        return view.graph.node_copy(view, lambda n: copies.get(n, n))
