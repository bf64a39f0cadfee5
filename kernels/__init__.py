"""Operators of graphopt: importing this registers them. Triton is loaded where a kernel runs."""

from graphopt.kernels import (
    chunked_rows,
    cross_entropy,
    deferred,
    filtering,
    quantized,
    rounded_attention,
)

__all__ = [
    "chunked_rows",
    "cross_entropy",
    "deferred",
    "filtering",
    "quantized",
    "rounded_attention",
]
