"""Placements under ops that cut, pad, flip and repeat one dim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graphopt.analysis.axis_rules.fold import Factor, factors, refold
from graphopt.analysis.axis_rules.placement import Leg, Placement
from graphopt.analysis.axis_rules.sizes import Shape, Size, Untrackable, quotient, tidy


def narrow(old: Placement, dim: int, begin: Size, count: Size, stride: Size = 1) -> Placement:
    """Positions ``begin, begin + stride, ...`` of ``dim``, ``count`` of them.

    A negative ``begin``, or a ``count`` past the end, pads with positions that belong to no index.

    Raises:
        Untrackable: ``dim`` holds the axis folded with other dims and the cut goes through it.
    """
    legs = old.on(dim)
    if not legs:
        return old
    if count == 1:
        return select(old, dim, begin)
    leg = legs[0]
    first, size = quotient(begin, leg.inner), quotient(count, leg.inner)
    clean = len(legs) == 1 and leg.outer == 1 and (leg.inner == 1 or stride == 1)
    if not clean or first is None or size is None:
        raise Untrackable(f"the cut of dim {dim} goes through the axis folded with other dims")
    new = replace(leg, size=size, step=tidy(leg.step * stride))
    return _swap(old, leg, new, tidy(leg.step * first))


def select(old: Placement, dim: int, index: Size) -> Placement:
    """One position of ``dim``; the dim itself stays, with size one."""
    for leg in old.on(dim):
        if not leg.whole and not isinstance(index, int):
            raise Untrackable(f"dim {dim} is folded and cut at {index}, which is not a number")
        digit = index if leg.whole else index // leg.inner % leg.size
        old = _swap(old, leg, None, tidy(leg.step * digit))
    return old


def flip(old: Placement, dims: Sequence[int]) -> Placement:
    """Reversed dims: every digit counts backwards."""
    for leg in old.legs:
        if leg.dim in dims:
            shift = tidy(leg.step * (leg.size - 1))
            old = _swap(old, leg, replace(leg, step=tidy(-leg.step)), shift)
    return old


def repeat(old: Placement, shape: Shape, dim: int, times: Size, *, inside: bool) -> Placement:
    """``dim`` repeated: as a whole (``1 2 1 2``), or each position ``inside`` (``1 1 2 2``)."""
    rows = factors(old, shape)
    copies = [Factor(times)]
    rows[dim] = rows[dim] + copies if inside else copies + rows[dim]
    return refold(rows, old.start)


def _swap(old: Placement, leg: Leg, new: Leg | None, shift: Size) -> Placement:
    legs = tuple(new if other is leg else other for other in old.legs)
    return Placement(tuple(leg for leg in legs if leg is not None), tidy(old.start + shift))
