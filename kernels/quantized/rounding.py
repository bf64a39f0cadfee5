"""Round to nearest: scales from the extremes of each group, or from a search over clipped ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from graphopt.kernels.quantized import codes as coding
from graphopt.kernels.quantized import scales as scaling
from graphopt.kernels.quantized.packing import row_chunks
from graphopt.kernels.quantized.ranges import grid, ranges, searched
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight, stored_dtype

Clip = Literal["none", "search"]
Pair = tuple[Tensor, Tensor | None]
"""Scales and zeros, float32."""


def quantize(
    weight: Tensor, scheme: Scheme, clip: Clip = "none", importance: Tensor | None = None
) -> QuantizedWeight:
    """Each number of a weight as the nearest one that its group can store.

    Args:
        weight: ``(N, K)``, floating point. It is read a few rows at a time.
        clip: ``"none"`` has the largest magnitude (or the smallest and the largest number) of a
            group stored without clipping; ``"search"`` takes, for each group, the one of some
            narrower ranges that has the smallest squared error.
        importance: ``(K,)``, not negative: what the squared error of each input counts in the
            search, such as its mean square or the diagonal of a Hessian.

    Raises:
        ValueError: the scheme does not fit K; the weight is no matrix of floats or holds NaN or
            infinity; importance has another shape, or goes with no search.
    """
    if clip not in ("none", "search"):
        raise ValueError(f"clip is {clip!r}; it is 'none' or 'search'")
    if importance is not None and clip != "search":
        raise ValueError("importance is what a search minimises: clip='search'")
    weight = weight.detach()
    counts = grouped_importance(importance, weight, scheme)
    outer = scaling.tensor_scale(weight, scheme)
    search = clip == "search"

    def find(groups: Tensor) -> Pair:
        return find_scales(groups, scheme, search=search, importance=counts, outer=outer)

    return quantized_by(weight, scheme, find, outer)


def find_scales(
    groups: Tensor,
    scheme: Scheme,
    *,
    search: bool = False,
    importance: Tensor | None = None,
    outer: Tensor | None = None,
) -> Pair:
    """Scales and zeros ``(..., 1)``, float32, of groups ``(..., group)``, float32.

    ``importance`` broadcasts against groups; ``outer`` is `scales.tensor_scale` of the weight.
    """
    if search:
        return searched(groups, scheme, grid(scheme), importance, outer)
    return ranges(groups, scheme, outer)


def quantized_by(
    weight: Tensor, scheme: Scheme, find: Callable[[Tensor], Pair], outer: Tensor | None = None
) -> QuantizedWeight:
    """A weight by what finds scales and zeros of groups ``(n, G, group)``, some rows at a time."""
    check_weight(weight, scheme)
    found = [find(_groups(weight[chunk], scheme)) for chunk in row_chunks(*weight.shape)] or [
        find(_groups(weight, scheme))
    ]
    scales = scaling.store(torch.cat([s for s, _ in found]).squeeze(-1), scheme, outer)
    zeros = None
    if not scheme.symmetric:
        zeros = torch.cat([z for _, z in found if z is not None]).squeeze(-1).to(scales.dtype)
    return encoded(weight, scales, zeros, scheme, outer)


def encoded(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scheme: Scheme,
    outer: Tensor | None = None,
) -> QuantizedWeight:
    """The nearest codes for scales and zeros ``(N, G)`` as they are stored."""
    rows, width = weight.shape
    made = weight.new_empty((rows, scheme.row_codes(width)), dtype=stored_dtype(scheme))
    for chunk in row_chunks(rows, width):
        scale = scaling.load(scales[chunk], scheme, outer, torch.float32)[..., None]
        zero = None if zeros is None else zeros[chunk].to(torch.float32)[..., None]
        codes = coding.encode(_groups(weight[chunk], scheme), scale, zero, scheme)
        made[chunk] = coding.store(codes.flatten(1), scheme)
    return QuantizedWeight(scheme, width, made, scales, zeros, outer)


def check_weight(weight: Tensor, scheme: Scheme) -> None:
    """Refuse what cannot be quantized."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"a weight is a matrix (N, K) of floats, not {weight.dtype} {tuple(weight.shape)}"
        )
    scheme.groups(weight.shape[1])
    if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
        raise ValueError("the weight holds NaN or infinity: there is no scale for it")


def grouped_importance(importance: Tensor | None, weight: Tensor, scheme: Scheme) -> Tensor | None:
    """Importance ``(K,)`` as ``(G, group)``, float32."""
    if importance is None:
        return None
    if importance.shape != weight.shape[1:]:
        raise ValueError(
            f"importance is {tuple(importance.shape)}; the weight has K = {weight.shape[-1]}"
        )
    if not (importance.isfinite() & (importance >= 0)).all():
        raise ValueError("importance is finite and not negative")
    groups = scheme.groups(weight.shape[1])
    return importance.detach().to(weight.device, torch.float32).reshape(groups, -1)


def _groups(rows: Tensor, scheme: Scheme) -> Tensor:
    wide = rows.detach().to(torch.float32)
    return wide.unflatten(1, (scheme.groups(rows.shape[1]), -1))
