"""An `ExportedProgram`, fresh from a trace or read from a file, as a `Program`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind as TorchInput
from torch.export.graph_signature import InputSpec, OutputSpec
from torch.export.graph_signature import OutputKind as TorchOutput
from torch.utils import _pytree as pytree

from graphopt.capture_limits import traced_assumptions
from graphopt.capture_modes import changes_mode, inline_grad_modes
from graphopt.errors import CaptureError
from graphopt.program import (
    CallSpec,
    InputKind,
    OutputKind,
    Program,
    ProgramInput,
    ProgramOutput,
    is_mutating,
)
from graphopt.source import source_line

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
    getattr(TorchOutput, "PARAMETER_MUTATION", None): OutputKind.BUFFER_MUTATION,
}


def from_exported(exported: ExportedProgram, *, training: bool, frozen: bool) -> Program:
    """Wrap an `ExportedProgram`, in training or in functional dialect; tied tensors stay tied.

    Raises:
        CaptureError: it holds something that is neither a tensor nor a plain value, or it writes
            differentiable values where gradients are off and ``frozen`` is false.
    """
    assumptions = traced_assumptions(exported)
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
        range_constraints=dict(exported.range_constraints),
        assumptions=assumptions,
        notes=notes,
    )
    _require_functional(program)
    _drop_unread(program)
    return program


def _functional(exported: ExportedProgram, *, frozen: bool) -> tuple[ExportedProgram, list[str]]:
    """The program without in-place writes and regions of its own, and what to tell the user."""
    nodes = list(exported.graph.nodes)
    if exported.dialect != "TRAINING" and not any(map(_needs_lowering, nodes)):
        return exported, []
    trained = _trained_inputs(exported)
    unsaid = inline_grad_modes(exported.graph_module, trained)
    if unsaid and not frozen:
        raise CaptureError(
            "a value with a gradient is written in place under torch.no_grad(); its gradient would "
            "be lost",
            where=source_line(unsaid[0]),
            fix="write into a copy made with .detach().clone(), or outside torch.no_grad()",
        )
    lines = dict.fromkeys(str(source_line(n)) for n in unsaid)
    notes = [f"gradients do not pass the in-place write under no_grad at {x}" for x in lines]
    return exported.run_decompositions({}), notes


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
    """Placeholders of tied duplicates go; their names stay in ``state`` as aliases."""
    for node, target in program.state_nodes().items():
        if not node.users and target not in program.mutated_state():
            program.graph.erase_node(node)
            del program.inputs[node.name]
    program.recompile()
