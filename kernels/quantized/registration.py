"""How operators with a quantized weight are registered: schemas, kernels, gradients, autocast.

Their schemas have the tensors of `QuantizedWeight.tensors` as `WEIGHT` and the fields of a `Scheme`
as `SCHEME`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.quantized.weight import OPERANDS

WEIGHT = "Tensor codes, Tensor scales, Tensor? zeros, Tensor? tensor_scale"
SCHEME = "int bits, str dtype, int? group_size, bool symmetric"
STATIC = "float? input_scale=None, int input_zero=128"
"""The fields of a `Static`, for ``activations="static"`` alone."""

_library = torch.library.Library("graphopt", "FRAGMENT")


def register(schema: str, real: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    """The operator of a schema ``name(...) -> Tensor``; ``real`` runs it on CPUs and on GPUs."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, real, key)
    torch.library.register_fake(f"graphopt::{name}", fake, lib=_library)
    return getattr(torch.ops.graphopt, name).default


def differentiate(operator: Any, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Gradients of an operator as `torch.library.register_autograd` has them; stored tensors have
    none."""
    names = [argument.name for argument in operator._schema.arguments]
    places = {name: names.index(name) for name in OPERANDS}

    def run(ctx: Any, grad: Tensor) -> Any:
        _refuse([name for name, place in places.items() if ctx.needs_input_grad[place]])
        return backward(ctx, grad)

    name = operator._schema.name
    torch.library.register_autograd(name, run, setup_context=setup, lib=_library)


def _refuse(asked: list[str]) -> None:
    """A gradient that is not computed must not look like zero."""
    if asked:
        raise RuntimeError(
            f"a quantized weight has no gradient for its {' and '.join(asked)}: "
            "requires_grad_(False)"
        )


def autocast(operator: Any) -> None:
    """As autocast does it for a product: the input in its dtype, the cast under autograd."""
    name = operator._schema.name.partition("::")[2]
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(name, _cast(device, operator), key)


def _cast(device: str, operator: Any) -> Any:
    def run(x: Tensor, *others: Any, **named: Any) -> Any:
        kind = torch.get_autocast_dtype(device)
        low = x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(kind)
        with torch.amp.autocast(device, enabled=False):
            return operator(low, *others, **named)

    return run
