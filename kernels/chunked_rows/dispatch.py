"""Heads on a GPU: a sweep in place of chunks, by the kernels of `graphopt.kernels.cross_entropy`.

A sweep holds no logits: what would be ``chunk x V`` numbers, several times over, never leaves the
processors. It takes one product forward and three backward, under autograd: slopes need the
log-sum-exp of a whole row, so that the logits are computed again even where the one result with a
gradient is a sum, whose gradients chunks have after three products in all. Gradients are summed up
in float32 and rounded once. Products are scaled by scaling ``hidden``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence, Set
from functools import lru_cache

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.body import Body
from graphopt.kernels.chunked_rows.operands import Operands, cast
from graphopt.kernels.chunked_rows.sweeping import KINDS, Product, UnfitError

_SHARED = 227 * 1024
"""Bytes of shared memory of a processor that the largest tiles may take."""


def by_triton(tensor: Tensor) -> bool:
    """Whether kernels are there for the device of a tensor."""
    return tensor.is_cuda and _is_able(tensor.device)


@lru_cache
def _is_able(device: torch.device) -> bool:
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= _SHARED


def evaluated(
    body: Body,
    operands: Operands[Tensor],
    autocast: torch.dtype | None,
    filter_threshold: float = 0.0,
) -> list[Tensor] | None:
    """All results by a sweep, differentiable; ``None`` where chunks are for them.

    Args:
        filter_threshold: above zero, gradients are approximate, see `cross_entropy.filtering`.

    Raises:
        IndexError: a target is no class; names the row.
    """
    if not by_triton(operands.hidden[0]) or len(operands.hidden) > 1 or body.swept is None:
        return None
    if operands.groups > 1:
        return _group_by_group(body, operands, autocast, filter_threshold)
    low, (program, wide) = cast(operands, autocast), body.swept
    if not _is_head(low) or not _is_narrow(low, program.parameters, wide):
        return None
    product = Product(low.hidden[0], low.weight[0], filter_threshold)
    try:
        rows, sums, _ = program([product, *operands.rows, *operands.whole])
    except UnfitError:
        return None
    return [result.clone() for result in (*rows, *sums)]


def _group_by_group(
    body: Body, operands: Operands[Tensor], autocast: torch.dtype | None, threshold: float
) -> list[Tensor] | None:
    """A sweep for each matrix of a weight; an error names the row of hidden."""
    count, parts = operands.groups, []
    for k in range(count):
        rows = [r.unflatten(0, (-1, count))[:, k] for r in operands.rows]
        own = Operands(operands.hidden, [operands.weight[0][k]], rows, operands.whole)
        found = evaluated(body, own, autocast, threshold)
        if found is None:
            return None
        parts.append(found)
    results, per_row = list(zip(*parts, strict=True)), len(body.rows)
    sums = [torch.stack(each).sum(0) for each in results[per_row:]]
    return [*(torch.stack(each, 1).flatten(0, 1) for each in results[:per_row]), *sums]


def _is_head(operands: Operands[Tensor]) -> bool:
    """Whether kernels take the product: rows of weight in one piece, none of its sizes 0."""
    hidden, weight = operands.hidden[0], operands.weight[0]
    kind, device = hidden.dtype, hidden.device
    placed = all(t.device == device for t in operands.all if t.dim())
    if not placed or kind not in KINDS or weight.dtype != kind or not _are_known(operands.all):
        return False
    return bool(weight.stride(1) == 1 and all(size > 0 for size in (*hidden.shape, *weight.shape)))


def _are_known(tensors: Sequence[Tensor]) -> bool:
    """Whether sizes can be compared while a program is traced."""
    sizes = [size for t in tensors for size in t.shape if isinstance(size, torch.SymInt)]
    if not sizes:
        return True
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return not any(map(free_unbacked_symbols, sizes))


def _is_narrow(operands: Operands[Tensor], parameters: Sequence[str], wide: Set[str]) -> bool:
    """Whether columns are all that a body makes beside the sweep, for all rows at once."""
    columns = all(size == 1 for t in operands.rows for size in t.shape[1:])
    named = zip(parameters[1 + len(operands.rows) :], operands.whole, strict=True)
    numbers = (t for name, t in named if name not in wide)
    return columns and all(size == 1 for t in numbers for size in t.shape)
