"""``graphopt::chunked_rows`` under autograd: gradients in the forward pass or after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from graphopt.kernels.chunked_rows.body import read
from graphopt.kernels.chunked_rows.chunks import evaluate
from graphopt.kernels.chunked_rows.dispatch import evaluated
from graphopt.kernels.chunked_rows.operands import Operands, autocast_of, check, grouped
from graphopt.kernels.chunked_rows.operator import (
    Settings,
    Tensors,
    casting,
    chunked_rows,
    library,
)

__all__ = ["chunked_rows"]


class _ChunkedRows(torch.autograd.Function):
    """Saves the operands; the gradients too, where one sum has them and its cotangent can wait."""

    @staticmethod
    def forward(ctx: Any, counts: list[int], settings: Settings, *tensors: Tensor) -> Any:
        ctx.counts, ctx.settings = counts, settings
        ctx.wanted = [t.requires_grad for t in tensors]
        ctx.gradients = None
        differentiable = settings[2]
        if _in_forward(tensors, settings):
            made = torch.ops.graphopt.chunked_rows_with_gradients(
                tensors, counts, *settings, wanted=ctx.wanted
            )
            results, ctx.gradients = made[: len(differentiable)], made[len(differentiable) :]
        else:
            o = grouped(tensors, counts)
            results = chunked_rows(o.hidden, o.weight, o.rows, o.whole, *settings)
        pairs = list(zip(results, differentiable, strict=True))
        ctx.mark_non_differentiable(*(r for r, has_gradient in pairs if not has_gradient))
        columns = pairs[len(pairs) - len(read(settings[0]).columns) :]
        totals = [r for r, has_gradient in columns if has_gradient]
        ctx.save_for_backward(*tensors, *totals)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        pairs = zip(cotangents, ctx.settings[2], strict=True)
        given = iter(_gradients(ctx, [c for c, has_gradient in pairs if has_gradient]))
        return None, None, *(next(given) if asked else None for asked in ctx.wanted)


def _in_forward(tensors: Tensors, settings: Settings) -> bool:
    """Whether the gradients for a cotangent of one are those of any, up to a factor."""
    text, _, differentiable, autocast, *_ = settings
    body = read(text)
    sums = differentiable[len(body.rows) : len(body.rows) + len(body.sums)]
    narrow = torch.float16 in (autocast, *(t.dtype for t in tensors)) or "torch.float16" in text
    return sum(differentiable) == sum(sums) == 1 and not narrow


def _gradients(ctx: Any, cotangents: Tensors) -> Sequence[Tensor]:
    """Gradients of the wanted operands; cotangents are those of the differentiable results."""
    if torch.is_grad_enabled():
        return _by_autograd(ctx, cotangents)
    if ctx.gradients is not None:
        # Ours alone and used up here: a second backward computes them anew.
        held, ctx.gradients = ctx.gradients, None
        if not torch.compiler.is_compiling() and not len(ctx.saved_tensors[0]):
            return held  # zeros, also where the cotangent of a mean of nothing is infinite
        return [g.mul_(cotangents[0]) for g in held]
    saved, count = ctx.saved_tensors, sum(ctx.counts)
    tensors, totals = saved[:count], saved[count:]
    found: list[Tensor] = torch.ops.graphopt.chunked_rows_backward(
        tensors,
        ctx.counts,
        *ctx.settings,
        wanted=ctx.wanted,
        cotangents=cotangents,
        totals=totals,
    )
    return found


def _by_autograd(ctx: Any, cotangents: Tensors) -> Sequence[Tensor]:
    """Gradients that have gradients themselves: through the products, held whole.

    Operands are taken as views: one may be given twice, or computed from another, and only what
    flows through its own place counts.
    """
    body, _, differentiable, autocast, *_ = ctx.settings
    views = [t.view_as(t) for t in ctx.saved_tensors[: sum(ctx.counts)]]
    with casting(views, autocast):
        results = evaluate(read(body), grouped(views, ctx.counts))
    chosen = [r for r, has_gradient in zip(results, differentiable, strict=True) if has_gradient]
    pairs = [p for p in zip(chosen, cotangents, strict=True) if p[0].requires_grad]
    asked = [view for view, wanted in zip(views, ctx.wanted, strict=True) if wanted]
    if not pairs:
        return [torch.zeros_like(view) for view in asked]
    outputs, slopes = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, asked, slopes, create_graph=True, allow_unused=True, materialize_grads=True
    )


def _with_autograd(
    hidden: Tensors,
    weight: Tensors,
    rows: Tensors,
    whole: Tensors,
    body: str,
    chunk_bytes: int,
    differentiable: Sequence[bool],
    autocast: torch.dtype | None = None,
    filter_threshold: float = 0.0,
    compiled: bool = False,
) -> list[Tensor]:
    operands = Operands(hidden, weight, rows, whole)
    check(operands, read(body), chunk_bytes, len(differentiable), filter_threshold)
    low = autocast or autocast_of(hidden[0])
    settings = (body, chunk_bytes, list(differentiable), low, filter_threshold, compiled)
    tensors = operands.all
    if _transformed(tensors):
        with casting(tensors, low):
            return evaluate(read(body), operands)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        with casting(tensors, low):
            found = evaluated(read(body), operands, low, filter_threshold)
        if found is not None:
            pairs = zip(found, differentiable, strict=True)
            return [r if has_gradient else r.detach() for r, has_gradient in pairs]
        return list(_ChunkedRows.apply(operands.counts, settings, *tensors))
    with torch._C._AutoDispatchBelowAutograd():
        made: list[Tensor] = chunked_rows(hidden, weight, rows, whole, *settings)
    return made


def _transformed(tensors: Tensors) -> bool:
    """Under ``torch.func`` or forward-mode differentiation: then all is done as in eager mode."""
    tangents = (forward_ad.unpack_dual(t).tangent for t in tensors)
    return torch._C._are_functorch_transforms_active() or any(t is not None for t in tangents)


library.impl("chunked_rows", _with_autograd, "Autograd")
