"""On a CPU: a linear layer and the activation after it as one oneDNN kernel.

Bound: the product's FLOPs stay; what is saved is one pass over the output that writes the bias and,
with an activation, one more that reads and writes it. The kernel has no derivative and knows no
autocast, so it stands beside the plain graph and runs only where neither is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from graphopt.emit.module import OptimizedModule
from graphopt.program import Program, copy_graph, val
from graphopt.rewrite import arguments
from graphopt.rewrite.rule import Numeric
from graphopt.verify.timing import interleaved
from graphopt.verify.trials import hold, trial_inputs

if TYPE_CHECKING:
    from graphopt.recipe import Options

aten = torch.ops.aten

ACTIVATIONS = {
    aten.relu.default: ("relu", ""),
    aten.sigmoid.default: ("sigmoid", ""),
    aten.tanh.default: ("tanh", ""),
    aten.silu.default: ("swish", ""),
    aten.hardswish.default: ("hardswish", ""),
}
"""Operators that the kernel applies to its result -> oneDNN's name and algorithm."""

WORTH = 0.98
"""The part of the plain graph's time that the fused one may take at most."""


def to_onednn(module: OptimizedModule, options: Options) -> None:
    """Give the module a second graph with fused linear layers, where it is right and faster here.

    Without ``options.measure`` nothing is known of its speed, and the module stays as it is.
    """
    program = module.program
    if not options.measure or not fits(program) or not (count := len(_linears(program.graph))):
        return
    options.progress("fuse linear layers")
    sets, _ = trial_inputs(program)
    found = [hold(program, program, s, Numeric.REASSOCIATED, lower=fused)[0] for s in sets]
    if wrong := next((m for m in found if not m.ok), None):
        note = f"linear layers were not fused in oneDNN: {wrong.note}, error {wrong.rms:.2g}"
        module.report.notes.append(note)
        return
    quick = fused(fx.GraphModule(program.graph_module, program.graph))
    pace = _race(module, quick, program.example_inputs)
    ratio = f"{pace[0] / pace[1]:.2f}x"
    if pace[1] <= WORTH * pace[0]:
        module.add_fast_path(quick)
        module.report.notes.append(
            f"without gradients, {count} linear layers run with their activations as oneDNN "
            f"kernels: {ratio} (in this process; a file holds the graph without)"
        )


def fits(program: Program) -> bool:
    """Whether weights are constants, and everything is in float32 on a CPU with oneDNN."""
    tensors = [*program.state.values(), *filter(_is_tensor, program.example_inputs)]
    floats = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    on_cpu = all(t.device.type == "cpu" and t.layout is torch.strided for t in tensors)
    return (
        program.frozen
        and on_cpu
        and all(t.dtype is torch.float32 for t in floats)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def fused(plain: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph with every linear layer, and an activation that alone reads it, fused."""
    graph = copy_graph(plain.graph)
    for node in _linears(graph):
        last, (name, algorithm) = node, ("none", "")
        if len(node.users) == 1 and (kind := _activation(next(iter(node.users)))):
            last, (name, algorithm) = next(iter(node.users)), kind
        given = arguments(node)
        with graph.inserting_before(last):
            made = graph.call_function(
                torch.ops.mkldnn._linear_pointwise.default,
                (given["input"], given["weight"], given["bias"], name, [], algorithm),
            )
        last.replace_all_uses_with(made)
        graph.erase_node(last)
        if last is not node:
            graph.erase_node(node)
    return fx.GraphModule(plain, graph)


def _linears(graph: fx.Graph) -> list[fx.Node]:
    """Products with a matrix, of values that have rows."""
    found = graph.find_nodes(op="call_function", target=aten.linear.default)
    return [n for n in found if val(n.args[0]).dim() >= 2 and val(n.args[1]).dim() == 2]


def _activation(node: fx.Node) -> tuple[str, str] | None:
    if node.target is aten.gelu.default:
        return "gelu", str(arguments(node)["approximate"])
    return ACTIVATIONS.get(node.target) if node.op == "call_function" else None


def _race(
    module: OptimizedModule, quick: fx.GraphModule, inputs: Sequence[Any]
) -> tuple[float, float]:
    flat = module._arguments(list(inputs))
    with torch.no_grad():
        pace = interleaved(lambda: module._graph.code(*flat), lambda: quick(*flat), budget=0.25)
    return pace.old, pace.new


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
