"""Ahead-of-time capture: an ``nn.Module`` and example inputs become a `Program`.

`torch.export` traces the module without Dynamo; decomposing with an empty table leaves functional
ATen with composites kept. Two things are done in between that torch leaves undone: regions under
``torch.no_grad()`` keep their meaning for gradients, and tied parameters stay one tensor.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputSpec, OutputSpec
from torch.export.graph_signature import InputKind as TorchInput
from torch.export.graph_signature import OutputKind as TorchOutput
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError
from graphopt.program import CallSpec, InputKind, OutputKind, Program, ProgramInput, ProgramOutput

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
    TorchOutput.PARAMETER_MUTATION: OutputKind.BUFFER_MUTATION,
    TorchOutput.USER_INPUT_MUTATION: OutputKind.INPUT_MUTATION,
}


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    frozen: bool | None = None,
) -> Program:
    """Capture ``model`` called as ``model(*args, **kwargs)``.

    Args:
        model: in training or eval mode; the program keeps that mode.
        dynamic_shapes: axes that must stay dynamic, as `torch.export.export` takes them.
        frozen: whether parameter values may be folded; default: yes exactly in eval mode.

    Raises:
        CaptureError: with one cause at the user's source line and what to change.
    """
    from graphopt.capture_errors import explain_capture_failure

    training = model.training
    values = dict(kwargs or {})
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            stack.enter_context(_tracing(model, values))
            exported = torch.export.export(
                model, tuple(args), values, dynamic_shapes=dynamic_shapes, strict=False
            )
            _inline_grad_modes(exported.graph_module)
            exported = exported.run_decompositions({})
        except Exception as error:
            raise explain_capture_failure(error, model) from error
    program = from_exported(
        exported, training=training, frozen=not training if frozen is None else frozen
    )
    program.name = type(model).__name__
    program.example_inputs = tuple(pytree.tree_leaves((tuple(args), values)))
    return program


@contextmanager
def _tracing(model: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """Gradients on, so that detached regions are seen; Hugging Face models through their patches."""
    with torch.enable_grad(), ExitStack() as stack:
        if _is_hugging_face(model):
            from graphopt.huggingface import tracing_patches

            stack.enter_context(tracing_patches(model, values))
        yield


def _is_hugging_face(model: nn.Module) -> bool:
    return any(c.__module__.startswith("transformers.") for c in type(model).__mro__)


def from_exported(exported: ExportedProgram, *, training: bool, frozen: bool) -> Program:
    """Wrap a decomposed `ExportedProgram`; tied tensors get one placeholder."""
    signature, graph_module = exported.graph_signature, exported.graph_module
    state = _state_of(exported)
    inputs = [_input(spec) for spec in signature.input_specs]
    outputs = [_output(spec) for spec in signature.output_specs]
    entry = exported.module_call_graph[0].signature
    names = tuple(entry.forward_arg_names or ()) if entry else ()
    program = Program(
        graph_module,
        {entry.name: entry for entry in inputs},
        outputs,
        state,
        CallSpec(exported.call_spec.in_spec, exported.call_spec.out_spec, names),
        frozen=frozen,
        training=training,
        range_constraints=dict(exported.range_constraints),
    )
    _require_functional(program)
    _drop_unread(program)
    return program


def _state_of(exported: ExportedProgram) -> dict[str, Tensor]:
    constants = {k: v for k, v in exported.constants.items() if isinstance(v, Tensor)}
    return {**exported.state_dict, **constants}


def _input(spec: InputSpec) -> ProgramInput:
    kind = _INPUT_KINDS.get(spec.kind)
    if kind is None:
        raise CaptureError(
            f"the model holds a {spec.kind.name.lower().replace('_', ' ')} ({spec.target}), "
            "which is not a tensor",
            fix="pass it as an input, or replace it by tensors and plain Python values",
        )
    persistent = spec.persistent is not False
    return ProgramInput(spec.arg.name, kind, spec.target, persistent)


def _output(spec: OutputSpec) -> ProgramOutput:
    kind = _OUTPUT_KINDS[spec.kind]
    return ProgramOutput(kind, spec.target if kind is not OutputKind.USER else None)


def _require_functional(program: Program) -> None:
    """Constants of the output are literals; everything else must be a legal functional graph."""
    program.graph.output_node().args = (tuple(program.graph.output_node().args[0]),)
    program.lint()


def _drop_unread(program: Program) -> None:
    """Placeholders of tied duplicates go; their names stay in ``state`` as aliases."""
    for node, target in program.state_nodes().items():
        if not node.users and target not in program.mutated_state():
            program.graph.erase_node(node)
            del program.inputs[node.name]
    program.recompile()


def _inline_grad_modes(module: fx.GraphModule) -> None:
    """Replace ``with torch.no_grad():`` regions by their nodes, outputs detached.

    Decomposition drops these regions and lets gradients flow where the user stopped them.
    """
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
            continue
        enabled, body, *operands = node.args
        inner = getattr(module, body.target)
        _inline_grad_modes(inner)
        _inline(module, node, inner, operands, detach=not enabled)
        if not body.users:
            module.graph.erase_node(body)
    module.graph.lint()
    module.recompile()


def _inline(
    module: fx.GraphModule,
    call: fx.Node,
    inner: fx.GraphModule,
    operands: list[Any],
    *,
    detach: bool,
) -> None:
    copies: dict[fx.Node, Any] = {}
    given = iter(operands)
    with module.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "output":
                results = fx.node.map_arg(node.args[0], copies.__getitem__)
            else:
                copies[node] = _copy_into(module, inner, node, copies)
        values = [_detached(module.graph, v) if detach else v for v in results]
    for user in list(call.users):
        user.replace_all_uses_with(values[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(call)


def _copy_into(
    module: fx.GraphModule, inner: fx.GraphModule, node: fx.Node, copies: dict[fx.Node, Any]
) -> fx.Node:
    made = module.graph.node_copy(node, copies.__getitem__)
    if node.op == "get_attr":
        name = f"_inlined_{made.name}"
        setattr(module, name, getattr(inner, str(node.target)))
        made.target = name
    return made


def _detached(graph: fx.Graph, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
        return value
    if not value.meta["val"].dtype.is_floating_point:
        return value
    node = graph.call_function(torch.ops.aten.detach.default, (value,))
    node.meta.update(value.meta)
    return node


def forward_parameters(model: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of ``model.forward``."""
    return tuple(inspect.signature(model.forward).parameters)


__all__ = ["ConstantArgument", "capture", "forward_parameters", "from_exported"]
