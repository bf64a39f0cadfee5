"""``embedding`` with a weight of the model, the weight quantized."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from graphopt.kernels.quantized.scheme import Scheme
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
        *(held.get(k) for k in ("codes", "scales", "zeros", "tensor_scale")),
        val(given["weight"]).shape[1],
        scheme.bits,
        scheme.dtype,
        scheme.group_size,
        scheme.symmetric,
        val(node).dtype,
    )
    return made
