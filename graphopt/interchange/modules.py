"""Layers whose weight stays as it is stored, in the places of torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.kernels.quantized import QuantizedWeight, Static, embedding, linear
from graphopt.kernels.quantized.weight import OPERANDS

PREFIX = "weight_"
"""Before the names of `QuantizedWeight.tensors` in state dicts."""


class _Stored(nn.Module):
    """Holds the tensors of a weight; they keep their dtypes whatever the module is cast to."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.scheme, self.width = weight.scheme, weight.width
        for name, tensor in weight.tensors.items():
            self.register_buffer(PREFIX + name, tensor)

    @property
    def weight(self) -> QuantizedWeight:
        """The weight, over the tensors that the module holds now."""
        held = (self._buffers.get(PREFIX + name) for name in OPERANDS)
        return QuantizedWeight(self.scheme, self.width, *held)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        stored = {id(b) for n, b in self._buffers.items() if n.startswith(PREFIX)}

        def moved(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            is_cast = id(tensor) in stored and made.dtype != tensor.dtype
            return tensor.to(made.device) if is_cast else made

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"{outputs}, {inputs}, {self.scheme}"


class QuantizedLinear(_Stored):
    """``nn.Linear`` with a quantized weight.

    Args:
        bias: ``(N,)``.
        activations: as ``graphopt::quantized_linear`` takes them.
        order: ``(K,)``, int64: column ``k`` of the weight takes input ``order[k]``.
        static: what static activations are quantized by.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        activations: str = "none",
        order: Tensor | None = None,
        static: Static | None = None,
    ) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.activations, self.static = activations, static
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., K)`` to ``(..., N)``, in the dtype of x."""
        columns = x if self.order is None else x.index_select(-1, self.order)
        return linear(columns, self.weight, self.bias, self.activations, self.static)


class QuantizedEmbedding(_Stored):
    """``nn.Embedding`` with a quantized table; rows come in ``dtype``."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype

    def forward(self, indices: Tensor) -> Tensor:
        """``(...)`` to ``(..., K)``."""
        return embedding(indices, self.weight, self.dtype)


def _frozen(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)
