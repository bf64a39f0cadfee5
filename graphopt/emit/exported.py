"""A program as a `torch.export.ExportedProgram`: what `.pt2` files and the ONNX exporter take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputSpec,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.export.graph_signature import InputKind as TorchInput
from torch.export.graph_signature import OutputKind as TorchOutput
from torch.utils import _pytree as pytree

from graphopt.errors import ExportError
from graphopt.program import Program, copy_graph, val
from graphopt.rewrite.builder import is_folded
from graphopt.signature import InputKind, OutputKind, ProgramInput

_ORDER = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT, InputKind.USER)
_INPUTS = {
    InputKind.PARAMETER: TorchInput.PARAMETER,
    InputKind.BUFFER: TorchInput.BUFFER,
    InputKind.CONSTANT: TorchInput.CONSTANT_TENSOR,
    InputKind.USER: TorchInput.USER_INPUT,
}
_OUTPUTS = {
    OutputKind.USER: TorchOutput.USER_OUTPUT,
    OutputKind.BUFFER_MUTATION: TorchOutput.BUFFER_MUTATION,
    OutputKind.INPUT_MUTATION: TorchOutput.USER_INPUT_MUTATION,
}


def to_exported(program: Program) -> ExportedProgram:
    """The same graph and tensors as an `ExportedProgram`; the program is left as it is.

    Raises:
        ExportError: the program came through Dynamo and has no call signature of its own.
    """
    call = program.call
    if call is None:
        raise ExportError(
            f"{program.name} was compiled as it is called and has no fixed signature",
            fix="compile it with example_inputs",
        )
    twin = program.copy()
    _order_placeholders(twin)
    root = _detached_root(twin)
    inputs = [_input_spec(twin.inputs[n.name], n) for n in twin.placeholders()]
    outputs = [
        OutputSpec(_OUTPUTS[o.kind], _argument(v), o.target)
        for v, o in zip(twin.results(), twin.outputs, strict=True)
    ]
    entry = ModuleCallSignature(
        [s.arg for s in inputs if s.kind is TorchInput.USER_INPUT],
        [s.arg for s in outputs if s.kind is TorchOutput.USER_OUTPUT],
        call.in_spec,
        call.out_spec,
        list(call.parameter_names) or None,
    )
    state, constants = _split_state(twin)
    args, kwargs = pytree.tree_unflatten(list(twin.example_inputs), call.in_spec)
    return ExportedProgram(
        root=root,
        graph=root.graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=state,
        range_constraints=dict(twin.range_constraints),
        module_call_graph=[ModuleCallEntry("", entry)],
        example_inputs=(args, kwargs),
        constants=constants,
    )


def _order_placeholders(program: Program) -> None:
    """Parameters, buffers, constants, then user inputs, as the exported signature lists them."""
    rank = {kind: i for i, kind in enumerate(_ORDER)}
    nodes = program.placeholders()
    ordered = sorted(nodes, key=lambda n: rank[_exported_kind(program.inputs[n.name])])
    with program.graph.inserting_before():
        mark = program.graph.call_function(len, ((),))
    for node in reversed(ordered):
        mark.append(node)
    program.graph.erase_node(mark)


def _exported_kind(entry: ProgramInput) -> InputKind:
    """Folded tensors are parameters where they are `nn.Parameter`, else constants or buffers."""
    if entry.kind is InputKind.CONSTANT and is_folded(entry.target or ""):
        return InputKind.BUFFER
    return entry.kind


def _detached_root(program: Program) -> fx.GraphModule:
    graph = copy_graph(program.graph)
    for node in graph.nodes:
        node.meta.pop("rewritten_by", None)
    return fx.GraphModule(program.graph_module, graph)


def _input_spec(entry: ProgramInput, node: fx.Node) -> InputSpec:
    kind = _exported_kind(entry)
    persistent = entry.persistent if kind is InputKind.BUFFER else None
    argument = _argument(node) if kind is not InputKind.USER else _user_argument(node)
    return InputSpec(_INPUTS[kind], argument, entry.target, persistent)


def _user_argument(node: fx.Node) -> Any:
    fake = val(node)
    if isinstance(fake, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        return _argument(node)
    return ConstantArgument(node.name, fake)


def _argument(value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return ConstantArgument("", value)
    kinds = (
        (torch.SymInt, SymIntArgument),
        (torch.SymFloat, SymFloatArgument),
        (torch.SymBool, SymBoolArgument),
    )
    for symbolic, argument in kinds:
        if isinstance(val(value), symbolic):
            return argument(value.name)
    return TensorArgument(value.name)


def _split_state(program: Program) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and persistent buffers, and the constants and other buffers beside them."""
    kinds = {e.target: _exported_kind(e) for e in program.inputs.values() if e.target}
    loose = {e.target for e in program.inputs.values() if not e.persistent}
    state: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for name, tensor in program.state.items():
        plain = kinds.get(name) is InputKind.CONSTANT or name in loose
        (constants if plain else state)[name] = tensor
    return state, constants
