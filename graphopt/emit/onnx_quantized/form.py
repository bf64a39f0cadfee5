"""A form: nodes of ONNX that compute what a quantized operator computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from graphopt.emit.onnx_quantized.calls import Call
from graphopt.emit.onnx_quantized.emitter import Emitter


class Product(NamedTuple):
    """What a form is written for.

    Attributes:
        call: the operator.
        x: the input: float32 ``(..., K)`` of two dimensions or more, or indices.
        rank: dimensions of the input.
        bias: float32 ``(N,)`` that a `Form.biased` form adds, or None.
    """

    call: Call
    x: Any
    rank: int
    bias: Any = None


@dataclass(frozen=True)
class Form:
    """One way to write a call.

    Attributes:
        name: in words.
        build: appends nodes; gives the result, float32.
        biased: whether it adds a bias itself.
        standard: whether it is of operators of the ONNX standard alone.
        rounds: whether it rounds activations.
        shares: whether it has one scale for all activations.
        unpacks: whether ONNX Runtime holds the weight in float32 once it is loaded.
        tier: forms of a higher tier are for where none of a lower holds.
        opset: the smallest operator set that has its operators.
    """

    name: str
    build: Callable[[Emitter, Product], Any]
    biased: bool = False
    standard: bool = False
    rounds: bool = False
    shares: bool = False
    unpacks: bool = False
    tier: int = 0
    opset: int = 18
