"""``graphopt::deferred``: the operator, and its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from graphopt.kernels.chunked_rows.body import read
from graphopt.kernels.chunked_rows.operands import Operands, autocast_of, check, grouped
from graphopt.kernels.chunked_rows.operator import library
from graphopt.kernels.deferred.dense import dense, kind_of, like
from graphopt.kernels.deferred.origin import Product
from graphopt.kernels.deferred.tensor import DeferredTensor

Tensors = Sequence[Tensor]
Settings = tuple[str, torch.dtype | None]
"""Body, autocast."""

library.define(
    "deferred(Tensor[] hidden, Tensor[] weight, Tensor[] rows, Tensor[] whole, str body, "
    "ScalarType? autocast=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

deferred = torch.ops.graphopt.deferred.default

_Modes = torch._C._TorchDispatchModeKey


def _deferred(
    hidden: Tensors,
    weight: Tensors,
    rows: Tensors,
    whole: Tensors,
    body: str,
    autocast: torch.dtype | None = None,
) -> Tensor:
    operands = Operands(hidden, weight, rows, whole)
    _check(operands, body)
    settings = (body, autocast or autocast_of(hidden[0]))
    if _only_shapes_matter(operands.all):
        return like(body, operands, settings[1])
    if _traced(operands.all):
        return dense(read(body), operands, settings[1])
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands.all):
        made: Tensor = _Deferred.apply(operands.counts, settings, *operands.all)
        return made
    return _promised(operands, settings)


def _check(operands: Operands[Tensor], text: str) -> None:
    body = read(text)
    check(operands, body, 0, 1)
    if body.sums or body.columns:
        raise ValueError("what is deferred has values per row; the body gives others")


def _promised(operands: Operands[Tensor], settings: Settings) -> DeferredTensor:
    body, autocast = settings
    dtype, shape = kind_of(body, operands, autocast)
    shown = torch.empty(shape, dtype=dtype, device=torch.device("meta"))
    device = operands.hidden[0].device
    return DeferredTensor(Product(operands, body, shown.shape, autocast), (), shown, device)


class _Deferred(torch.autograd.Function):
    """Saves the operands; the product is taken again where a gradient comes back."""

    @staticmethod
    def forward(ctx: Any, counts: list[int], settings: Settings, *tensors: Tensor) -> Any:
        ctx.counts, ctx.settings = counts, settings
        ctx.wanted = [t.requires_grad for t in tensors]
        ctx.save_for_backward(*tensors)
        made = _promised(grouped(tensors, counts), settings)
        if not made.is_floating_point():
            ctx.mark_non_differentiable(made)
        return made

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """Operands are taken as views: one may be given twice, or computed from another."""
        body, autocast = ctx.settings
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            views = [
                t.view_as(t) if again else t.detach().requires_grad_(w)
                for t, w in zip(ctx.saved_tensors, ctx.wanted, strict=True)
            ]
            matrix = dense(read(body), grouped(views, ctx.counts), autocast)
            asked = [view for view, w in zip(views, ctx.wanted, strict=True) if w]
            found = iter(
                torch.autograd.grad(
                    matrix,
                    asked,
                    cotangents,
                    create_graph=again,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
        return None, None, *(next(found) if w else None for w in ctx.wanted)


def _only_shapes_matter(tensors: Tensors) -> bool:
    """Whether fake values are propagated, and nothing is recorded.

    No size is asked for then, which the operators of a body may do.
    """
    recorded = torch._C._get_dispatch_mode(_Modes.PROXY) or torch._C._get_dispatch_mode(
        _Modes.FUNCTIONAL
    )
    return recorded is None and any(isinstance(t, FakeTensor) for t in tensors)


def _traced(tensors: Tensors) -> bool:
    """Whether somebody wants to see the operators, or the operands are no ordinary tensors."""
    if torch._C._are_functorch_transforms_active():
        return True
    if any(torch._C._get_dispatch_mode(mode) for mode in (_Modes.PROXY, _Modes.FUNCTIONAL)):
        return True
    if any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
        return True
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


library.impl("deferred", _deferred, "CompositeImplicitAutograd")
