"""Slots of a translated model replaced by the forms that were chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from graphopt.emit.onnx_quantized.choosing import Choice
from graphopt.emit.onnx_quantized.emitter import MICROSOFT, Emitter
from graphopt.emit.onnx_quantized.form import Product
from graphopt.emit.onnx_quantized.slots import DOMAIN
from graphopt.onnx_types import code_of


class _Site(NamedTuple):
    """Nodes that go, the value that they gave, and the bias among their inputs."""

    nodes: list[Any]
    result: Any
    bias: Any


def place(model: Any, choices: Sequence[Choice]) -> None:
    """Replace every slot of an ``onnx_ir`` model, in place."""
    import onnx_ir

    emit = Emitter()
    for node in [n for n in model.graph.all_nodes() if n.domain == DOMAIN]:
        choice = choices[node.attributes["key"].as_int()]
        site = _site(node, choice)
        start = len(emit.nodes)
        made = _written(emit, node.inputs[0], site.bias, choice)
        for value in emit.constants.values():
            if value.name not in model.graph.initializers:
                model.graph.register_initializer(value)
        onnx_ir.convenience.replace_nodes_and_values(
            node.graph, node, site.nodes, emit.nodes[start:], [site.result], [made]
        )
    model.opset_imports.pop(DOMAIN, None)
    if any(n.domain == MICROSOFT for n in emit.nodes):
        model.opset_imports[MICROSOFT] = 1


def _site(node: Any, choice: Choice) -> _Site:
    """The slot, and the addition after it where the form adds the bias itself."""
    result = node.outputs[0]
    users = list(result.uses())
    alone = _Site([node], result, None)
    if not choice.form.biased or choice.call.dtype != torch.float32:
        return alone
    if len(users) != 1 or result.is_graph_output():
        return alone
    user = users[0].node
    bias = next((v for v in user.inputs if v is not result), None)
    if bias is None or bias.const_value is None or bias.shape is None:
        return alone
    if user.op_type != "Add" or user.domain or tuple(bias.shape) != (choice.call.weight.shape[0],):
        return alone
    return _Site([user, node], user.outputs[0], bias)


def _written(emit: Emitter, x: Any, bias: Any, choice: Choice) -> Any:
    """The form on float32 and two dimensions at least, as products want it."""
    call, rank = choice.call, choice.call.rank
    if call.embedding:
        made = choice.form.build(emit, Product(call, x, rank))
        return made if call.dtype == torch.float32 else emit("Cast", made, to=code_of(call.dtype))
    if call.dtype != torch.float32:
        x = emit("Cast", x, to=code_of(torch.float32))
    if rank == 1:
        x = emit("Unsqueeze", x, emit.numbers(0))
    made = choice.form.build(emit, Product(call, x, max(rank, 2), bias))
    if rank == 1:
        made = emit("Squeeze", made, emit.numbers(0))
    return made if call.dtype == torch.float32 else emit("Cast", made, to=code_of(call.dtype))
