"""``graphopt::cross_entropy_rows`` under autograd and autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.cross_entropy import reference
from graphopt.kernels.cross_entropy.operands import Cotangents, Head, Summaries
from graphopt.kernels.cross_entropy.operator import cross_entropy_rows, library

__all__ = ["cross_entropy_rows"]

_OTHERS = 10 - 4
"""Inputs after the bias: none of them has a gradient."""


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Summaries) -> None:
    """Saves the operands; the entropies too, from which their slopes follow."""
    hidden, weight, target, bias, softcap, ignore_index, sums, entropy, _, threshold = inputs
    summaries = Summaries(*output)
    ctx.settings = softcap, ignore_index
    ctx.threshold, ctx.asked = threshold, (True, True, sums, entropy)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(summaries.argmax)
    ctx.save_for_backward(hidden, weight, target, bias, summaries.lse, summaries.entropy)


def _backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, target, bias, lse, entropy = ctx.saved_tensors
    cotangents = Cotangents(*(c if a else None for c, a in zip(given[:4], ctx.asked, strict=True)))
    needs = ctx.needs_input_grad  # of the inputs given, defaults left out
    wanted = [needs[0], needs[1], len(needs) > 3 and needs[3]]
    head = Head(hidden, weight, target, bias, *ctx.settings)
    if torch.is_grad_enabled():
        found = _by_autograd(head, cotangents, wanted)
    else:
        operands = (hidden, weight, target, bias, *ctx.settings, lse, entropy, *cotangents)
        found = torch.ops.graphopt.cross_entropy_rows_backward(*operands, wanted, ctx.threshold)
    made = iter(found)
    d_hidden, d_weight, d_bias = (next(made) if asked else None for asked in wanted)
    return d_hidden, d_weight, None, d_bias, *[None] * _OTHERS


def _by_autograd(head: Head, cotangents: Cotangents, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Gradients that have gradients themselves: through the logits, held whole.

    Operands are taken as views: one may be given twice, or computed from another, and only what
    flows through its own place counts.
    """
    hidden, weight, bias = head.hidden, head.weight, head.bias
    hidden, weight = hidden.view_as(hidden), weight.view_as(weight)
    bias = bias if bias is None else bias.view_as(bias)
    viewed = head._replace(hidden=hidden, weight=weight, bias=bias)
    results = reference.summaries(reference.logits(viewed), viewed)[:4]
    pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if c is not None]
    trio = zip((hidden, weight, bias), wanted, strict=True)
    asked = [t for t, is_wanted in trio if is_wanted]
    outputs, slopes = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, asked, slopes, create_graph=True, allow_unused=True, materialize_grads=True
    )


torch.library.register_autograd(
    "graphopt::cross_entropy_rows", _backward, setup_context=_setup, lib=library
)


def _cast(device: str) -> Any:
    """As autocast does it for a product: operands in its dtype, the cast under autograd."""

    def run(hidden: Tensor, weight: Tensor, *others: Any, **named: Any) -> Any:
        kind = torch.get_autocast_dtype(device)
        low = [t if t.dtype == torch.float64 else t.to(kind) for t in (hidden, weight)]
        with torch.amp.autocast(device, enabled=False):
            return cross_entropy_rows(*low, *others, **named)

    return run


library.impl("cross_entropy_rows", _cast("cpu"), "AutocastCPU")
library.impl("cross_entropy_rows", _cast("cuda"), "AutocastCUDA")
