"""Just-in-time capture: a Dynamo graph becomes the `Program` that ahead-of-time capture gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import detect_fake_mode

from graphopt.capture_errors import first_line
from graphopt.capture_exported import keep_differentiable, spell_layout_free
from graphopt.dynamo_sizes import guard_indexed_sizes, read_sizes_off_inputs
from graphopt.errors import CaptureError
from graphopt.program import Program
from graphopt.recompute import take_regions
from graphopt.signature import InputKind, OutputKind, ProgramInput, ProgramOutput
from graphopt.source import source_line

_SET_GRAD = torch._C._set_grad_enabled
_ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast


def program_from_dynamo(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Program:
    """Bring Dynamo's torch-level graph into functional ATen with composites kept.

    Every tensor, parameters included, is a user input, because it may be replaced between calls;
    nothing may be folded into it (``frozen=False``).

    Raises:
        CaptureError: the graph holds something without a functional form.
    """
    holders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    fakes, mode = fake_inputs(graph_module)
    _refuse_autocast(graph_module.graph)
    try:
        with mode, torch.enable_grad():
            made: Any = aot_export_module(
                graph_module, fakes, trace_joint=False, pre_dispatch=True, decompositions={}
            )
    except Exception as error:
        raise CaptureError(f"no functional form: {first_line(error)}") from error
    flat, signature = made
    take_regions(flat.graph)
    _apply_grad_modes(flat.graph)
    inputs = [n for n in flat.graph.nodes if n.op == "placeholder"]
    for node, holder in zip(inputs, holders, strict=True):
        _rename(node, holder.name)
    mutated = {**signature.user_inputs_to_mutate, **signature.buffers_to_mutate}
    program = Program(
        flat,
        {n.name: ProgramInput(n.name, InputKind.USER) for n in inputs},
        _outputs(flat.graph, signature, mutated),
        frozen=False,
        training=True,
        example_inputs=tuple(map(_concrete, example_inputs)),
        name=_model_name(graph_module),
    )
    program.graph.output_node().args = (program.results(),)
    guard_indexed_sizes(flat.graph)
    spell_layout_free(flat.graph)
    keep_differentiable(flat.graph)
    read_sizes_off_inputs(flat.graph)
    program.recompile().lint()
    return program


def fake_inputs(graph_module: fx.GraphModule) -> tuple[list[Any], Any]:
    """The fake value of each input of Dynamo's graph, and the mode they belong to.

    Raises:
        CaptureError: the graph is not Dynamo's.
    """
    holders = graph_module.graph.find_nodes(op="placeholder")
    fakes = [n.meta.get("example_value", n.meta.get("val")) for n in holders]
    mode = detect_fake_mode(fakes)
    if mode is None:
        raise CaptureError("the graph carries no fake values", fix="call through torch.compile")
    return fakes, mode


def _refuse_autocast(graph: fx.Graph) -> None:
    """A region's casts are no nodes here: what is moved over its border would change precision."""
    nodes = iter(graph.nodes)
    if any(n.target is _ENTER_AUTOCAST for n in nodes):
        raise CaptureError(
            "forward holds a region under torch.autocast",
            where=next(filter(None, map(source_line, nodes)), None),
            fix="put torch.autocast around the call of the model, or pass example_inputs",
        )


def _rename(node: fx.Node, name: str) -> None:
    node._rename(name.strip("_") or "input")


def _outputs(graph: fx.Graph, signature: Any, mutated: dict[str, str]) -> list[ProgramOutput]:
    """Updates of inputs come first, in the order in which the graph lists them."""
    by_old_name = dict(
        zip(
            signature.user_inputs,
            [n.name for n in graph.nodes if n.op == "placeholder"],
            strict=True,
        )
    )
    values: Any = graph.output_node().args[0]
    updates = [
        ProgramOutput(OutputKind.INPUT_MUTATION, by_old_name[target]) for target in mutated.values()
    ]
    return updates + [ProgramOutput(OutputKind.USER)] * (len(values) - len(updates))


def _apply_grad_modes(graph: fx.Graph) -> None:
    """Values made while gradients were off are detached where they leave that stretch of code."""
    enabled, off = True, set()
    for node in list(graph.nodes):
        if node.target is _SET_GRAD:
            enabled = bool(node.args[0])
            graph.erase_node(node)
        elif not enabled and node.op == "call_function":
            off.add(node)
    for node in off:
        if _is_floating(node) and any(u not in off for u in node.users):
            _detach(graph, node, off)


def _detach(graph: fx.Graph, node: fx.Node, off: set[fx.Node]) -> None:
    with graph.inserting_after(node):
        stopped = graph.call_function(torch.ops.aten.detach.default, (node,))
    stopped.meta.update(node.meta)
    node.replace_all_uses_with(
        stopped,
        delete_user_cb=lambda user: user is not stopped and user not in off,
        propagate_meta=False,
    )


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def _model_name(graph_module: fx.GraphModule) -> str:
    """Name of the outermost module in the graph."""
    for node in graph_module.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            kind = next(iter(stack.values()))[1]
            return kind.__name__ if isinstance(kind, type) else str(kind).rsplit(".", 1)[-1]
    return "compiled_graph"


def _concrete(value: Any) -> Any:
    """The number behind a symbolic size, and a copy of a tensor that has no gradients to give."""
    if isinstance(value, Tensor) and value.is_inference():
        return value.clone()
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value
