"""Products with a constant matrix in an ONNX model, and why others are none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.onnx_files.numbers import held_tensor, is_standard
from graphopt.onnx_files.random_nodes import STANDARD

FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
_VIEWS = frozenset(
    {
        *("Cast", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"),
        "Unsqueeze",
    }
)
"""Operators that show numbers without computing others."""


@dataclass(frozen=True, eq=False)
class Product:
    """``x W^T * scale + bias * share`` for a weight W of ``(N, K)``.

    Attributes:
        node: ``MatMul`` or ``Gemm``.
        source: the value whose numbers W is.
        turned: whether it holds ``(K, N)``.
        via: a transposition between it and the node, if there is one.
        scale, share: ``alpha`` and ``beta`` of ``Gemm``.
    """

    node: Any
    source: Any
    turned: bool
    via: Any = None
    scale: float = 1.0
    bias: Any = None
    share: float = 1.0

    @property
    def name(self) -> str:
        return str(self.source.name)

    @property
    def x(self) -> Any:
        return self.node.inputs[0]

    @property
    def result(self) -> Any:
        return self.node.outputs[0]

    @property
    def reading(self) -> tuple[bool, float]:
        """How the weight is read: products that read it otherwise cannot share its codes."""
        return self.turned, self.scale

    def matrix(self) -> Tensor:
        """W, float32 ``(N, K)``."""
        array = held_tensor(self.source).numpy().astype(np.float32)
        array = array.T if self.turned else array
        return torch.from_numpy(np.ascontiguousarray(array)) * self.scale


def products(model: Any) -> Iterator[Product]:
    """Those of the main graph."""
    for node in model.graph:
        if node.domain not in STANDARD or len(node.inputs) < 2 or node.inputs[1] is None:
            continue
        if node.op_type == "MatMul":
            yield from _product(node, stored=True)
        elif node.op_type == "Gemm" and not node.attributes.get_int("transA", 0):
            yield from _product(
                node,
                stored=not node.attributes.get_int("transB", 0),
                scale=float(node.attributes.get_float("alpha", 1.0)),
                bias=node.inputs[2] if len(node.inputs) > 2 else None,
                share=float(node.attributes.get_float("beta", 1.0)),
            )


def _product(node: Any, *, stored: bool, **more: Any) -> Iterator[Product]:
    """Args: stored: whether the operand is ``(K, N)``."""
    value = node.inputs[1]
    turning = value.producer()
    via = None
    if _is_transposition(turning):
        via, value, stored = turning, turning.inputs[0], not stored
    tensor = held_tensor(value)
    if tensor is not None and len(tensor.shape) == 2 and value is not node.inputs[0]:
        yield Product(node, value, stored, via, **more)


def _is_transposition(node: Any) -> bool:
    return is_standard(node, "Transpose") and list(node.attributes.get_ints("perm", [1, 0])) == [
        1,
        0,
    ]


def refusal(product: Product, every: list[Product]) -> str:
    """Why a weight stays as it is, whatever is asked for; empty where it need not."""
    tensor = held_tensor(product.source)
    if tensor.dtype.name not in FLOATS:
        return f"its weight is {tensor.dtype.name.lower()}"
    mine = [p for p in every if p.source is product.source]
    if any(p.reading != product.reading for p in mine):
        return "products read its weight in different ways"
    readers = {id(p.node) for p in mine} | {id(p.via) for p in mine if p.via is not None}
    reader = next((use.node for use in product.source.uses() if id(use.node) not in readers), None)
    others = [use.node for p in mine if p.via is not None for use in p.via.outputs[0].uses()]
    reader = reader or next((node for node in others if id(node) not in readers), None)
    if reader is not None:
        kind = f"`{reader.op_type}`"
        return f"{kind} reads the weight too: quantized it would be held twice"
    shown = product.source.is_graph_output()
    if shown or any(p.via is not None and p.via.outputs[0].is_graph_output() for p in mine):
        return "the weight is an output of the model"
    if not np.isfinite(tensor.numpy().astype(np.float32)).all():
        return "the weight holds NaN or infinity"
    return ""


def is_head(product: Product) -> bool:
    """Whether the caller gets the product, its bias added, as it is or as views of it."""
    stack, biased = [(product.result, False)], False
    while stack:
        value, biased = stack.pop()
        if value.is_graph_output():
            return True
        for use in value.uses():
            node = use.node
            adds = node.op_type == "Add" and not node.domain and not biased
            if adds and all(v is value or held_tensor(v) is not None for v in node.inputs):
                stack.append((node.outputs[0], True))
            elif node.op_type in _VIEWS and not node.domain and use.idx == 0:
                stack += [(v, biased) for v in node.outputs]
    return False


def others(model: Any, found: list[Product]) -> Iterator[tuple[Any, str, str]]:
    """Products that are none of ``found``: node, weight and reason, where they have a weight."""
    known = {id(p.node) for p in found}
    main = {id(node) for node in model.graph}
    for node in model.graph.all_nodes():
        if node.op_type not in _READERS or id(node) in known:
            continue
        for index, value in enumerate(node.inputs):
            tensor = None if value is None else held_tensor(value)
            if tensor is not None and len(tensor.shape) >= 2 and tensor.dtype.name in FLOATS:
                yield node, str(value.name), _reason(node, index, tensor, id(node) in main)


_READERS = frozenset({"MatMul", "Gemm", "Attention", "FusedMatMul", "Conv", "LSTM", "GRU", "RNN"})


def _reason(node: Any, index: int, tensor: Any, in_main: bool) -> str:
    if node.op_type not in ("MatMul", "Gemm"):
        return f"weights of `{node.op_type}` are not quantized in an ONNX file"
    if not in_main:
        return "it is in a subgraph"
    if index == 0:
        return "the weight is the left operand"
    if len(tensor.shape) > 2:
        return f"the weight has {len(tensor.shape)} axes, {math.prod(tensor.shape[:-2])} matrices"
    return "it is `Gemm` with transA"
