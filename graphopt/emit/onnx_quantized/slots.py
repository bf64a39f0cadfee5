"""Operators that stand for quantized ones while the rest of a program becomes ONNX.

A slot has the input and the shape of what it stands for, and its number. It is never run: nodes of
the domain `DOMAIN` are replaced before a file is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

DOMAIN, NAME = "graphopt", "Slot"

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("onnx_linear(Tensor input, int outputs, int key) -> Tensor")
_library.define(
    "onnx_embedding(Tensor indices, int width, int key, ScalarType out_dtype) -> Tensor"
)

LINEAR = torch.ops.graphopt.onnx_linear.default
EMBEDDING = torch.ops.graphopt.onnx_embedding.default


def _linear(x: Tensor, outputs: int, _key: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def _embedding(indices: Tensor, width: int, _key: int, dtype: torch.dtype) -> Tensor:
    return indices.new_empty((*indices.shape, width), dtype=dtype)


torch.library.register_fake("graphopt::onnx_linear", _linear, lib=_library)
torch.library.register_fake("graphopt::onnx_embedding", _embedding, lib=_library)


def translations() -> dict[Any, Callable[..., Any]]:
    """What `torch.onnx.export` takes as ``custom_translation_table``."""

    def linear(input: Any, outputs: int, key: int) -> Any:  # noqa: ARG001
        return _slot()(input, key=key)

    def embedding(indices: Any, width: int, key: int, out_dtype: int) -> Any:  # noqa: ARG001
        return _slot()(indices, key=key)

    return {LINEAR: linear, EMBEDDING: embedding}


@cache
def _slot() -> Any:
    """The ONNX operator; onnxscript calls only what has a schema."""
    from onnx.defs import OpSchema
    from onnxscript import values

    kinds = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "double")]
    schema = OpSchema(
        NAME,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter("x", "S")],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[
            ("S", [*kinds, "tensor(int32)", "tensor(int64)"], ""),
            ("T", kinds, ""),
        ],
        attributes=[OpSchema.Attribute("key", OpSchema.AttrType.INT)],
    )
    return values.Op(values.Opset(DOMAIN, 1), NAME, schema)
