"""What Inductor is given instead of operators that it leaves whole, or is slow at, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from graphopt.emit.gelu import quick_gelu
from graphopt.kernels.quantized import integers
from graphopt.kernels.quantized.operator import quantized_linear
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.spelled import int4_linear, int8_linear, static_linear
from graphopt.kernels.quantized.static import static_of
from graphopt.kernels.rounded_attention import (
    DTYPES,
    FEW,
    cast_before,
    is_fast,
    rounded_attention,
)
from graphopt.program import copy_graph, val
from graphopt.rewrite import arguments

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def spelled(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph that computes the same within rounding, gradients included."""
    graph = copy_graph(module.graph)
    for target, spell in _SPELLINGS.items():
        for node in graph.find_nodes(op="call_function", target=target):
            on_cpu = val(node).device.type == "cpu"
            if on_cpu and (made := spell(node, arguments(node))) is not None:
                node.target, node.args = made
                node.kwargs = {}
    return fx.GraphModule(module, graph)


def _gelu(node: fx.Node, given: Mapping[str, Any]) -> Call | None:
    if given["approximate"] != "none" or val(node).dtype is not torch.float32:
        return None
    return quick_gelu, (given["self"],)


def _quantized(_node: fx.Node, given: Mapping[str, Any]) -> Call | None:
    scheme = Scheme(*(given[name] for name in ("bits", "dtype", "group_size", "symmetric")))
    if given["layout"] == "int4pack":
        names = ("input", "codes", "scales", "bias")
        return int4_linear, (*(given[name] for name in names), scheme.group_size, scheme.symmetric)
    fits = scheme == Scheme(8) and given["layout"] == "plain" and given["activations"] != "none"
    narrow = val(given["codes"]).shape[1] < 2  # see `integers._int_mm_takes`
    if not fits or narrow or not integers.is_exact("int_mm"):
        return None
    read = tuple(given[name] for name in ("input", "codes", "scales", "bias"))
    static = static_of(given)
    return (int8_linear, read) if static is None else (static_linear, (*read, *static))


def _attention(_node: fx.Node, given: Mapping[str, Any]) -> Call | None:
    """Where it is known to run in half precision's own products."""
    query, key = val(given["query"]), val(given["key"])
    if query.dim() != 4 or not is_fast(DTYPES[given["activations"]]):
        return None
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    is_many = isinstance(rows, int) and rows >= FEW
    return (cast_before, tuple(given.values())) if is_many else None


_SPELLINGS: dict[Any, Callable[[fx.Node, Mapping[str, Any]], Call | None]] = {
    torch.ops.aten.gelu.default: _gelu,
    quantized_linear: _quantized,
    rounded_attention: _attention,
}
