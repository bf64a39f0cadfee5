"""An `ExportedProgram`, fresh from a trace or read from a file, as a `Program`."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind as TorchInput
from torch.export.graph_signature import InputSpec, OutputSpec
from torch.export.graph_signature import OutputKind as TorchOutput
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges

from graphopt.capture_limits import allowing_one, attention_assumptions, traced_assumptions
from graphopt.capture_lowering import lower_in_place
from graphopt.capture_modes import changes_mode, inline_grad_modes
from graphopt.errors import CaptureError
from graphopt.program import Program, is_mutating, val
from graphopt.signature import CallSpec, InputKind, OutputKind, ProgramInput, ProgramOutput
from graphopt.source import source_line

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_INPUT_KINDS = {
    TorchInput.PARAMETER: InputKind.PARAMETER,
    TorchInput.BUFFER: InputKind.BUFFER,
    TorchInput.CONSTANT_TENSOR: InputKind.CONSTANT,
    TorchInput.USER_INPUT: InputKind.USER,
}
_OUTPUT_KINDS = {
    TorchOutput.USER_OUTPUT: OutputKind.USER,
    TorchOutput.LOSS_OUTPUT: OutputKind.USER,
    TorchOutput.BUFFER_MUTATION: OutputKind.BUFFER_MUTATION,
    TorchOutput.USER_INPUT_MUTATION: OutputKind.INPUT_MUTATION,
}


def from_exported(exported: ExportedProgram, *, training: bool, frozen: bool) -> Program:
    """Wrap an `ExportedProgram`, in training or in functional dialect; tied tensors stay tied.

    Raises:
        CaptureError: it holds something that is neither a tensor nor a plain value, or it writes
            differentiable values where gradients are off and ``frozen`` is false.
    """
    assumptions = (*traced_assumptions(exported), *attention_assumptions(exported))
    exported, notes = _functional(exported, frozen=frozen)
    signature = exported.graph_signature
    inputs = [_input(spec, exported) for spec in signature.input_specs]
    entry = exported.module_call_graph[0].signature
    names = tuple(entry.forward_arg_names or ()) if entry else ()
    program = Program(
        exported.graph_module,
        {entry.name: entry for entry in inputs},
        [_output(spec) for spec in signature.output_specs],
        _state_of(exported),
        CallSpec(exported.call_spec.in_spec, exported.call_spec.out_spec, names),
        frozen=frozen,
        training=training,
        range_constraints={s: allowing_one(r) for s, r in exported.range_constraints.items()},
        assumptions=assumptions,
        notes=notes,
    )
    _as_traced(program)
    _require_functional(program)
    spell_layout_free(program.graph)
    if not frozen:
        keep_differentiable(program.graph)
    _drop_unread(program)
    return program


def _as_traced(program: Program) -> None:
    """Let fake sizes be 2 or more, as they are in a trace; a file has ranges with 1 among them.

    Else every operator that could broadcast a size of 1 would demand that it is not 1. Programs are
    tried at sizes of 1 instead.
    """
    for node in program.user_inputs():
        for size in getattr(val(node), "shape", ()):
            symbol = size.node.expr if isinstance(size, torch.SymInt) else None
            if isinstance(symbol, sympy.Symbol) and (size.node.hint or 0) >= 2:
                ranges = size.node.shape_env.var_to_range
                if ranges[symbol].lower < 2:
                    ranges[symbol] = ValueRanges(2, ranges[symbol].upper)


def _functional(exported: ExportedProgram, *, frozen: bool) -> tuple[ExportedProgram, list[str]]:
    """The program without in-place writes and regions of its own, and what to tell the user."""
    nodes = list(exported.graph.nodes)
    if exported.dialect != "TRAINING" and not any(map(_needs_lowering, nodes)):
        return exported, []
    trained = _trained_inputs(exported)
    unsaid = inline_grad_modes(exported.graph_module, trained)
    if unsaid and not frozen:
        raise CaptureError(
            "a value with a gradient is written in place where autograd does not see it (under "
            "torch.no_grad(), or through .detach() or .data); its gradient would be lost",
            where=source_line(unsaid[0]),
            fix="write into a copy made with .detach().clone(), or let autograd see the write",
        )
    lines = dict.fromkeys(str(source_line(n)) for n in unsaid)
    notes = [f"gradients do not pass the in-place write at {x}" for x in lines]
    if not lower_in_place(exported.graph):
        exported = exported.run_decompositions({})
    return exported, notes


def _needs_lowering(node: fx.Node) -> bool:
    return is_mutating(node.target) or changes_mode(node)


def _trained_inputs(exported: ExportedProgram) -> set[str]:
    """Placeholders of the parameters and of the example inputs that require gradients."""
    state, examples = exported.state_dict, pytree.tree_leaves(exported.example_inputs or ())
    trained, given = set(), iter(examples)
    for spec in exported.graph_signature.input_specs:
        value = None
        if spec.kind is TorchInput.PARAMETER:
            value = state[str(spec.target)]
        elif spec.kind is TorchInput.USER_INPUT:
            value = next(given, None)
        if isinstance(value, Tensor) and value.requires_grad:
            trained.add(spec.arg.name)
    return trained


def _state_of(exported: ExportedProgram) -> dict[str, Tensor]:
    constants = {k: v for k, v in exported.constants.items() if isinstance(v, Tensor)}
    return {**exported.state_dict, **constants}


def _input(spec: InputSpec, exported: ExportedProgram) -> ProgramInput:
    kind = _INPUT_KINDS.get(spec.kind)
    if kind is None:
        held = exported.constants.get(str(spec.target))
        what = type(held).__name__ if held is not None else spec.kind.name.lower()
        raise CaptureError(
            f"the graph uses a {what}, which is not a tensor",
            where=_first_use(exported, spec.arg.name),
            fix="draw random numbers outside and pass them, or keep the value in plain Python",
        )
    return ProgramInput(spec.arg.name, kind, spec.target, spec.persistent is not False)


def _first_use(exported: ExportedProgram, name: str) -> str | None:
    node = next(n for n in exported.graph.nodes if n.name == name)
    return next((line for user in node.users if (line := source_line(user))), None)


def _output(spec: OutputSpec) -> ProgramOutput:
    kind = _OUTPUT_KINDS.get(spec.kind)
    if kind is None and spec.kind.name == "PARAMETER_MUTATION":
        raise CaptureError(
            f"forward writes the parameter {spec.target} in place",
            where=str(spec.target),
            fix="register it as a buffer if forward updates it, or update it outside forward",
        )
    if kind is None:
        raise CaptureError(
            f"the exported program returns a {spec.kind.name.lower().replace('_', ' ')}",
            fix="export the forward computation, without its backward",
        )
    return ProgramOutput(kind, spec.target if kind is not OutputKind.USER else None)


def _require_functional(program: Program) -> None:
    """Constants of the output are literals; everything else must be a legal functional graph."""
    results: Any = program.graph.output_node().args[0]
    program.graph.output_node().args = (tuple(results),)
    program.lint()


def _drop_unread(program: Program) -> None:
    """Placeholders of tied duplicates go; their names stay in ``state`` as aliases.

    A file keeps tied tensors as two views of one storage; the unread one becomes the read one.
    """
    for node, target in program.state_nodes().items():
        if not node.users and target not in program.mutated_state():
            program.graph.erase_node(node)
            del program.inputs[node.name]
    read = set(program.state_nodes().values())
    places = {_place(program.state[name]): program.state[name] for name in read}
    for name, tensor in program.state.items():
        if name not in read and tensor.numel():
            program.state[name] = places.get(_place(tensor), tensor)
    program.recompile()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Which memory a tensor shows, and how."""
    start = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (*start, tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def spell_layout_free(graph: fx.Graph) -> None:
    """``view`` relies on the strides of the example and of the backend that attention chose while
    tracing, ``reshape`` on none."""
    for node in graph.nodes:
        if node.target in _VIEWS:
            node.target = aten.reshape.default


def keep_differentiable(graph: fx.Graph) -> None:
    """``copy``, which slice assignments leave behind, has no derivative."""
    for node in graph.find_nodes(op="call_function", target=aten.copy.default):
        _spell_copy(graph, node)


def _spell_copy(graph: fx.Graph, node: fx.Node) -> None:
    """``copy(x, source)`` is ``source`` in the shape, dtype and device of ``x``."""
    value: Any = node.args[1]
    target, given = val(node.args[0]), val(value)
    with graph.inserting_before(node):
        if (given.dtype, given.device) != (target.dtype, target.device):
            kind = {"dtype": target.dtype, "device": target.device}
            value = graph.call_function(aten._to_copy.default, (value,), kind)
            value.meta = {**node.meta, "val": given.to(target.dtype)}
        if given.shape != target.shape:
            value = graph.call_function(aten.expand_as.default, (value, node.args[0]))
            value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    graph.erase_node(node)
