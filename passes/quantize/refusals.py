"""Which weights can be stored in few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.kernels.quantized.remainder import weight_beside
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.program import Program
from graphopt.rewrite import Refusal, arguments

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def constant_refusal(program: Program, weight: fx.Node) -> Refusal | None:
    """Why the values of state cannot be relied on, if they cannot."""
    if program.is_constant(weight):
        return None
    if program.frozen:
        return Refusal(f"the model writes `{weight.name}`", weight)
    return Refusal("the model trains: its weights change", weight)


def numbers_refusal(matrix: Tensor, scheme: Scheme, weight: fx.Node) -> Refusal | None:
    """Why numbers ``(N, K)`` cannot be stored by a scheme, if they cannot."""
    if matrix.dim() != 2 or matrix.dtype not in FLOATS:
        reason = f"a weight {matrix.dtype} {tuple(matrix.shape)} is not quantized"
        return Refusal(reason, weight)
    try:
        scheme.groups(matrix.shape[1])
    except ValueError as error:
        return Refusal(str(error), weight)
    if not matrix.isfinite().all():
        return Refusal("the weight holds NaN or infinity", weight)
    return None


def _is_remainder(program: Program, weight: fx.Node) -> bool:
    return weight_beside(program.target_of(weight) or "", program.state) is not None


def readers(program: Program, target: Any) -> dict[fx.Node, list[fx.Node]]:
    """Calls of an operator on a weight of the model, by weight, in graph order.

    What was put beside codes to make good what they lose is none.
    """
    found: dict[fx.Node, list[fx.Node]] = {}
    weights = {w for w in program.weights() if not _is_remainder(program, w)}
    for node in program.graph.find_nodes(op="call_function", target=target):
        weight = arguments(node)["weight"]
        if weight in weights:
            found.setdefault(weight, []).append(node)
    return found
