"""What a program costs: operations, bytes moved, live memory, and the time that follows.

Everything is read from the fake tensors; symbolic sizes count with the values seen at capture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add, getitem

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node
from torch.utils.flop_counter import flop_registry

from graphopt.analysis.flops import Like, flops, hint, like, operator, tensors
from graphopt.analysis.flow import bodies
from graphopt.analysis.roofline import Roofline, measure_roofline

__all__ = [
    "Cost",
    "ProgramCost",
    "Roofline",
    "compute_dtype",
    "estimate_seconds",
    "hint",
    "measure_roofline",
    "node_cost",
    "program_cost",
]

ROWS_ONLY = frozenset({"embedding", "gather", "index", "index_select", "take", "take_along_dim"})
"""Operators that read only the chosen elements of their first argument."""

MAY_COPY = frozenset({"reshape", "reshape_as", "flatten", "contiguous", "to", "ravel", "view_as"})
"""Operators that are views where the strides allow, and copies elsewhere."""


@dataclass(frozen=True)
class Cost:
    """Operations (a multiply-add is two) and bytes read from and written to memory."""

    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
        )


@dataclass(frozen=True)
class ProgramCost:
    """The cost of a program run node by node, without autograd.

    Attributes:
        total: the sum over nodes.
        nodes: the cost of each node, in program order.
        held_bytes: inputs, parameters and buffers, which the caller keeps alive.
        peak_bytes: the most that results take at one time, each from its node to its last use;
            memory that an operator needs only while it runs is not known.
        peak_node: where that is.
    """

    total: Cost
    nodes: dict[Node, Cost]
    held_bytes: int
    peak_bytes: int
    peak_node: Node | None

    def seconds(self, roofline: Roofline) -> float:
        """The sum of the nodes' estimated times, one launch for each that does something."""
        return sum(estimate_seconds(c, roofline, compute_dtype(n)) for n, c in self.nodes.items())


def estimate_seconds(cost: Cost, roofline: Roofline, dtype: torch.dtype = torch.float32) -> float:
    """Seconds of one call: the longer of computing in ``dtype`` and moving the bytes, and a launch.

    A cost of nothing (a view) takes no time.
    """
    if cost == Cost():
        return 0.0
    work = max(cost.flops / roofline.rate(dtype), cost.bytes / roofline.bytes_per_s)
    return work + roofline.launch_s


def compute_dtype(node: Node) -> torch.dtype:
    """The dtype of the first floating tensor that ``node`` reads or gives, else float32."""
    seen = tensors(like((*node.all_input_nodes, node)))
    return next((t.dtype for t in seen if t.dtype.is_floating_point), torch.float32)


def node_cost(node: Node, sizes: Mapping[str, int] | None = None) -> Cost:
    """The cost of one call of ``node``.

    Views, sizes and bookkeeping cost nothing. Calls into graphs cost what the graph does, the
    dearest of several; calls into code that cannot be seen cost their inputs and results.

    Args:
        sizes: values for symbols of the shapes (``{"s0": 128}``) other than those at capture.
    """
    results = tensors(like(node, sizes))
    if not node.op.startswith("call_") or not results or _is_alias(node, sizes):
        return Cost()
    if node.target not in flop_registry and (graphs := bodies(node)):
        return max((program_cost(g, sizes).total for g in graphs), key=lambda c: (c.flops, c.bytes))
    known = isinstance(node.target, OpOverload | HigherOrderOperator)
    written = (
        0 if operator(node).startswith(("empty", "new_empty")) else sum(t.nbytes for t in results)
    )
    return Cost(flops(node, sizes) if known else 0, _bytes_read(node, results, sizes), written)


def program_cost(graph: Graph, sizes: Mapping[str, int] | None = None) -> ProgramCost:
    """The cost of every node, their sum and the peak of memory; ``sizes`` as in `node_cost`."""
    nodes = {node: node_cost(node, sizes) for node in graph.nodes}
    held = graph.find_nodes(op="placeholder")
    peak, where = _peak(graph, sizes)
    return ProgramCost(
        total=reduce(add, nodes.values(), Cost()),
        nodes=nodes,
        held_bytes=sum(_result_bytes(node, sizes) for node in held),
        peak_bytes=peak,
        peak_node=where,
    )


def _peak(graph: Graph, sizes: Mapping[str, int] | None) -> tuple[int, Node | None]:
    """The most bytes of results alive at a node, and that node."""
    owner: dict[Node, Node] = {}
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        owner[node] = owner[node.all_input_nodes[0]] if _is_alias(node, sizes) else node
        last.update({owner[p]: node for p in (*node.all_input_nodes, node)})
    made = {n: _result_bytes(n, sizes) for n in last if n.op.startswith("call_")}
    dying: dict[Node, int] = defaultdict(int)
    for node, size in made.items():
        dying[last[node]] += size
    live, peak, where = 0, 0, None
    for node in graph.nodes:
        live += made.get(node, 0)
        if live > peak:
            peak, where = live, node
        live -= dying[node]
    return peak, where


def _result_bytes(node: Node, sizes: Mapping[str, int] | None) -> int:
    return sum(t.nbytes for t in tensors(like(node, sizes)))


def _bytes_read(node: Node, results: list[Like], sizes: Mapping[str, int] | None) -> int:
    read = {p: sum(t.extent for t in tensors(like(p, sizes))) for p in node.all_input_nodes}
    table = node.args[0] if node.args else None
    if operator(node) in ROWS_ONLY and isinstance(table, Node):
        read[table] = min(read[table], results[0].nbytes)
    return sum(read.values())


def _is_alias(node: Node, sizes: Mapping[str, int] | None) -> bool:
    """Whether the result lies in the memory of the first argument."""
    if node.target is getitem:
        return True
    if not isinstance(node.target, OpOverload) or not node.args:
        return False
    if operator(node).endswith("dropout"):
        return len(node.args) > 2 and node.args[2] is False
    if not node.target.is_view or operator(node) not in MAY_COPY:
        return node.target.is_view
    return _views_as(like(node.args[0], sizes), like(node, sizes))


def _views_as(source: Like, result: Like) -> bool:
    """Whether ``view`` makes ``result`` of ``source``."""
    try:
        return bool(like(source.meta().view(result.shape)) == result)
    except RuntimeError:
        return False
