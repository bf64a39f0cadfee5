"""Every form that a quantized operator can be written in."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from graphopt.emit.onnx_quantized import decoded, dynamic, nbits, qdq, static
from graphopt.emit.onnx_quantized.calls import Call
from graphopt.emit.onnx_quantized.form import Form
from graphopt.emit.onnx_quantized.integers import integers
from graphopt.errors import ExportError


def forms_of(call: Call, *, standard: bool, opset: int) -> list[Form]:
    """What the call can be written in, what is tried first first.

    Raises:
        ExportError: nothing.
    """
    forms = [f for f in _every_form(call) if f.opset <= opset and (f.standard or not standard)]
    if not forms:
        raise ExportError(
            f"{call.scheme.dtype} weights with {_activations(call)} have no form in operator set "
            f"{opset}",
            where=call.where,
            fix="take operator set 21 or later",
        )
    return sorted(forms, key=lambda form: form.tier)


def _activations(call: Call) -> str:
    return "static activations" if call.static is not None else f"activations={call.activations!r}"


def _every_form(call: Call) -> Iterator[Form]:
    found = integers(call.weight)
    if call.embedding:
        if found is not None and call.dtype != torch.float64:
            yield from nbits.rows(call, found)
        yield decoded.rows()
        return
    if call.static is not None:
        if found is not None and call.scheme.dtype == "int":
            yield from static.products(found)
            yield from qdq.products(call, found)
        return
    if call.activations == "dynamic" and found is not None and not call.tied:
        yield from dynamic.products(call, found)
    if found is not None:
        yield from nbits.products(call, found)
        yield from qdq.products(call, found)
    yield from decoded.products(call, found)
