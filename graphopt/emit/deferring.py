"""Keeping what is deferred out of the graphs that Inductor compiles: it would compute it there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import fx, nn

from graphopt.analysis.flow import dependents
from graphopt.kernels.deferred import deferred

Compiled = Callable[..., Any]


def apart(graph_module: fx.GraphModule, lower: Callable[[fx.GraphModule], Compiled]) -> Compiled:
    """A graph lowered by ``lower``, but for its deferred calls and the views of them.

    Args:
        lower: makes a graph executable, which returns a tuple.
    """
    calls = graph_module.graph.find_nodes(op="call_function", target=deferred)
    if not calls:
        return lower(graph_module)
    late = {*calls, *dependents(calls)}
    output = graph_module.graph.output_node()
    read = (a for n in (*late, output) for a in n.all_input_nodes if a not in late)
    made = sorted({n for n in read if n.op != "placeholder"})
    return _InTurn(lower(_without(graph_module, late, made)), _from(graph_module, late, made))


class _InTurn(nn.Module):
    """Two graphs, of which the second takes the inputs of the first, and then its results."""

    def __init__(self, first: Compiled, second: fx.GraphModule) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, *inputs: Any) -> Any:
        return self.second(*inputs, *self.first(*inputs))


def _without(
    module: fx.GraphModule, late: Collection[fx.Node], made: Sequence[fx.Node]
) -> fx.GraphModule:
    """The graph up to ``made``, which it returns."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        if node not in late and node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in made))
    return fx.GraphModule(module, graph)


def _from(
    module: fx.GraphModule, late: Collection[fx.Node], made: Sequence[fx.Node]
) -> fx.GraphModule:
    """The graph from ``made`` on, which it takes behind the original's inputs."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
    for node in made:
        copies[node] = graph.placeholder(node.name)
    for node in module.graph.nodes:
        if node in late or node.op == "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(module, graph)
