"""Placements applied to real tensors: which index a position has, and the part of an index."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import Tensor

from graphopt.analysis.axis_rules.placement import Leg, Placement
from graphopt.analysis.axis_rules.sizes import Size, size_of
from graphopt.errors import GraphoptError


def bind_sizes(fake: Tensor, real: Tensor) -> dict[sympy.Symbol, int]:
    """The numbers that the symbols in the shape of ``fake`` have in ``real``."""
    pairs = zip(map(size_of, fake.shape), real.shape, strict=True)
    return {symbol: size for symbol, size in pairs if isinstance(symbol, sympy.Symbol)}


def index_map(placement: Placement, rank: int) -> Tensor:
    """The axis index of every position: int64, broadcasts against a tensor of ``rank`` dims."""
    index = torch.full((1,) * rank, _number(placement.start))
    for leg in placement.legs:
        outer, size, inner = map(_number, (leg.outer, leg.size, leg.inner))
        digits = torch.arange(outer * size * inner) // inner % size * _number(leg.step)
        index = index + digits.view([-1 if dim == leg.dim else 1 for dim in range(rank)])
    return index


def slice_along(tensor: Tensor, placement: Placement, index: int | Sequence[int]) -> Tensor:
    """The part of a tensor that belongs to an index of the axis, or to several.

    All dims stay: one that is the axis gets the size of ``index``, one that holds it folded with
    other dims keeps the others.

    Args:
        index: one index; several only where one dim holds the whole axis.

    Raises:
        GraphoptError: the tensor holds no position of an index (it was sliced away), or the
            placement has symbols left (see `Placement.at`), or several indices of a split axis.
    """
    wanted = [index] if isinstance(index, int) else list(index)
    if placement.pinned and wanted == [_number(placement.start)]:
        return tensor
    if len(wanted) == 1:
        return _one(tensor, placement, wanted[0])
    if len(placement.legs) != 1:
        raise GraphoptError(
            f"an axis in {len(placement.legs)} parts ({placement}) has no slice of several indices",
            fix="take one index at a time, or flatten the axis into one dim first",
        )
    (leg,) = placement.legs
    digits = [_digits(placement, i)[0] for i in wanted]
    return _take(tensor, leg, digits, shrunk=1)


def _one(tensor: Tensor, placement: Placement, index: int) -> Tensor:
    digits = _digits(placement, index)
    shrunk: dict[int, int] = {}
    for leg, digit in reversed(list(zip(placement.legs, digits, strict=True))):
        tensor = _take(tensor, leg, [digit], shrunk.get(leg.dim, 1))
        shrunk[leg.dim] = shrunk.get(leg.dim, 1) * _number(leg.size)
    return tensor


def _digits(placement: Placement, index: int) -> list[int]:
    """The digit of ``index`` in each leg."""
    sizes = [_number(leg.size) for leg in placement.legs]
    grid = torch.full((1,) * len(sizes), _number(placement.start))
    for k, leg in enumerate(placement.legs):
        steps = torch.arange(sizes[k]) * _number(leg.step)
        grid = grid + steps.view([-1 if k == other else 1 for other in range(len(sizes))])
    hits = (grid == index).nonzero()
    if len(hits) != 1:
        raise GraphoptError(
            f"index {index} of the axis has {len(hits)} places in a tensor placed as {placement}",
            fix="ask for an index that the tensor holds once",
        )
    return [int(digit) for digit in hits[0]]


def _take(tensor: Tensor, leg: Leg, digits: list[int], shrunk: int) -> Tensor:
    size, inner = _number(leg.size), _number(leg.inner) // shrunk
    parts = tensor.unflatten(leg.dim, (-1, size, inner))
    chosen: Tensor = parts.index_select(leg.dim + 1, torch.tensor(digits))
    return chosen.flatten(leg.dim, leg.dim + 2)


def _number(size: Size) -> int:
    if isinstance(size, int):
        return size
    raise GraphoptError(
        f"a placement still has the symbolic size {size}",
        fix="replace symbols by numbers with placement.at(bind_sizes(fake, real))",
    )
