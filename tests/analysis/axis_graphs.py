"""Small graphs for tests of the axis analysis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from graphopt.analysis.axes import AxisFlow, trace_axis


def capture(fn: Callable[..., Any], *args: Tensor, dynamic: Any = None) -> Graph:
    """A function as a graph of functional ATen with composites kept."""

    class Wrapped(nn.Module):
        def forward(self, *inputs: Tensor) -> Any:
            return fn(*inputs)

    exported = torch.export.export(
        Wrapped(), args, dynamic_shapes=(dynamic,) if dynamic else None, strict=False
    )
    return exported.run_decompositions({}).graph


def inputs(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def result(graph: Graph, k: int = 0) -> Node:
    return graph.output_node().args[0][k]


def trace(fn: Callable[..., Any], *args: Tensor, dim: Any = 1) -> tuple[AxisFlow, Node]:
    graph = capture(fn, *args)
    return trace_axis(inputs(graph)[0], dim), result(graph)


def one(flow: AxisFlow, kind: type) -> Any:
    """The only verdict of its kind."""
    (verdict,) = [v for v in flow.verdicts.values() if isinstance(v, kind)]
    return verdict
