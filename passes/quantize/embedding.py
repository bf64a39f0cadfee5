"""``embedding`` with a weight of the model, the weight quantized."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import OPERANDS
from graphopt.program import val
from graphopt.rewrite import Builder, arguments


def call(node: fx.Node, held: Mapping[str, fx.Node], scheme: Scheme, build: Builder) -> fx.Node:
    """The look-up of ``node`` in a weight that is stored as ``held``.

    What says how a gradient is summed up (``padding_idx``, ``scale_grad_by_freq``, ``sparse``) has
    no meaning where the weight has none.
    """
    given = arguments(node)
    made: fx.Node = build(
        torch.ops.graphopt.quantized_embedding.default,
        given["indices"],
        *map(held.get, OPERANDS),
        val(given["weight"]).shape[1],
        *scheme.arguments,
        val(node).dtype,
    )
    return made
