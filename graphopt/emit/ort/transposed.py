"""Products with transposed weights that read torch's own memory.

torch multiplies by the transpose of what it stores, ONNX by what it stores, so that torch's
exporter stores every weight of a linear layer once more, transposed. ONNX Runtime's ``FusedMatMul``
reads it as torch has it. Timed on one thread, 64 rows and a 2048 x 2048 weight, neither is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.emit.onnx_quantized.emitter import MICROSOFT


def read_as_stored(model: Any, state: Mapping[str, Tensor], least: int) -> None:
    """Let products read weights of ``state`` in place of transposed copies, in place.

    Args:
        model: an ``onnx_ir`` model.
        least: bytes of the smallest copy worth it.
    """
    stored = [(n, t) for n, t in state.items() if t.dim() == 2 and t.dtype == torch.float32]
    for value in list(model.graph.initializers.values()):
        held = value.const_value
        if held is None or held.nbytes <= least or isinstance(getattr(held, "raw", None), Tensor):
            continue
        uses = list(value.uses())
        read = bool(uses) and all(map(_is_product, uses))
        if read and (found := _transpose_of(held, stored)) is not None:
            _reread(model, value, *found)


def _is_product(use: Any) -> bool:
    """Whether it is the second factor of a product whose first one is a matrix or several."""
    node = use.node
    if (node.domain, node.op_type) != ("", "MatMul") or use.idx != 1:
        return False
    shape = node.inputs[0].shape
    return shape is not None and len(shape) >= 2


def _transpose_of(held: Any, stored: Iterable[tuple[str, Tensor]]) -> tuple[str, Tensor] | None:
    """The weight that a constant is the transpose of, and its name."""
    shape = tuple(held.shape.numpy())
    if len(shape) != 2 or held.dtype.name != "FLOAT":
        return None
    fitting = [(n, t) for n, t in stored if tuple(t.shape) == shape[::-1] and t.is_contiguous()]
    if not fitting:
        return None
    numbers = torch.from_numpy(held.numpy())
    return next(((n, t) for n, t in fitting if torch.equal(t.detach().t(), numbers)), None)


def _reread(model: Any, value: Any, name: str, tensor: Tensor) -> None:
    import onnx_ir

    initializers = model.graph.initializers
    if name not in initializers:
        raw = onnx_ir.tensor_adapters.TorchTensor(tensor.detach(), name=name)
        initializers[name] = onnx_ir.Value(
            name=name, shape=raw.shape, type=onnx_ir.TensorType(raw.dtype), const_value=raw
        )
    for use in list(value.uses()):
        use.node.replace_input_with(1, initializers[name])
        use.node.domain, use.node.op_type = MICROSOFT, "FusedMatMul"
        use.node.attributes["transB"] = onnx_ir.AttrInt64("transB", 1)
    del initializers[value.name]
    model.opset_imports[MICROSOFT] = 1
