"""Making ONNX nodes and initializers, for a model or for an operator by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.onnx_types import code_of

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


class Emitter:
    """Collects nodes and initializers; a constant of one name is made once.

    Attributes:
        nodes: in the order in which they compute.
        constants: initializers by name.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def __call__(self, operator: str, *inputs: Any, domain: str = "", **attributes: Any) -> Any:
        """Append a node; its only output. Inputs that are None are left out."""
        import onnx_ir

        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        node = onnx_ir.node(operator, inputs, attributes, domain=domain)
        self.nodes.append(node)
        return node.outputs[0]

    def own(self, operator: str, *inputs: Any, **attributes: Any) -> Any:
        """Append a node of ONNX Runtime's own domain."""
        return self(operator, *inputs, domain=MICROSOFT, **attributes)

    def constant(
        self, name: str, tensor: Tensor, kind: str = "", shape: tuple[int, ...] | None = None
    ) -> Any:
        """An initializer; of ONNX's ``kind`` and ``shape`` where bytes hold several numbers."""
        if name not in self.constants:
            self.constants[name] = _initializer(name, tensor, kind, shape or tuple(tensor.shape))
        return self.constants[name]

    def numbers(self, *values: int) -> Any:
        """An int64 vector, named by what it holds."""
        name = "_".join(map(str, values))
        return self.constant(f"graphopt.sizes_{name}", torch.tensor(values, dtype=torch.int64))

    def number(self, name: str, value: float, dtype: torch.dtype = torch.float32) -> Any:
        """A constant without dimensions."""
        return self.constant(f"graphopt.{name}", torch.tensor(value, dtype=dtype))


def _initializer(name: str, tensor: Tensor, kind: str, shape: tuple[int, ...]) -> Any:
    import onnx_ir
    from onnx import TensorProto

    found = TensorProto(name=name, dims=shape)
    found.data_type = getattr(TensorProto, kind) if kind else code_of(tensor.dtype)
    plain = tensor.detach().contiguous().reshape(-1)
    found.raw_data = plain.view(torch.uint8).numpy().tobytes()
    held = onnx_ir.serde.deserialize_tensor(found)
    return onnx_ir.Value(
        name=name, shape=held.shape, type=onnx_ir.TensorType(held.dtype), const_value=held
    )
