"""Placements under row-major views: dims as lists of factors, poured into other dims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from graphopt.analysis.axis_rules.placement import Leg, Placement
from graphopt.analysis.axis_rules.sizes import Shape, Size, Untrackable, product, quotient, tidy


@dataclass(frozen=True)
class Factor:
    """Part of a dim in row-major order: ``step`` is ``None`` where it is not the axis."""

    size: Size
    step: Size | None = None


def seed(shape: Shape, dims: Sequence[int]) -> tuple[Placement, Size]:
    """The placement of an axis made of ``dims`` in row-major order, and its extent."""
    rows = [[Factor(size)] for size in shape]
    for k, dim in enumerate(dims):
        rows[dim] = [Factor(shape[dim], product(shape[inner] for inner in dims[k + 1 :]))]
    return refold(rows, 0), product(shape[dim] for dim in dims)


def factors(old: Placement, shape: Shape) -> list[list[Factor]]:
    """Each dim of ``shape`` as factors from the slowest to the fastest."""
    out: list[list[Factor]] = []
    for dim, size in enumerate(shape):
        legs = old.on(dim)
        row = [Factor(legs[0].outer if legs else size)]
        for leg, below in zip_longest(legs, legs[1:]):
            inside = product((below.size, below.inner)) if below else 1
            gap = quotient(leg.inner, inside)
            if gap is None:
                raise Untrackable(f"dim {dim} holds the axis in parts that do not divide")
            row += [Factor(leg.size, leg.step), Factor(gap)]
        out.append(row)
    return out


def refold(dims: Iterable[Sequence[Factor]], start: Size) -> Placement:
    """The placement that factor lists describe, in its one canonical spelling."""
    legs = []
    for dim, row in enumerate(dims):
        row = merge(row)
        for k, factor in enumerate(row):
            if factor.step is not None:
                outer = product(other.size for other in row[:k])
                inner = product(other.size for other in row[k + 1 :])
                legs.append(Leg(dim, factor.size, factor.step, outer, inner))
    return Placement(tuple(legs), start)


def merge(row: Iterable[Factor]) -> list[Factor]:
    """Neighbours joined where they form one digit; factors of size one dropped."""
    out: list[Factor] = []
    for factor in row:
        if factor.size == 1:
            continue
        last = out[-1] if out else None
        if last and last.step is None and factor.step is None:
            out[-1] = Factor(product((last.size, factor.size)))
        elif last and last.step is not None and last.step == _times(factor.step, factor.size):
            out[-1] = Factor(product((last.size, factor.size)), factor.step)
        else:
            out.append(factor)
    return out


def reshape(old: Placement, source: Shape, target: Shape) -> Placement:
    """The placement after a row-major view of ``source`` as ``target``.

    Raises:
        Untrackable: a dim of ``target`` cuts through the axis at no whole digit.
    """
    if source == target or old.pinned:
        return old
    rows = factors(old, source)
    head = _common(source, target)
    tail = min(_common(source[::-1], target[::-1]), len(source) - head, len(target) - head)
    middle = merge(factor for row in rows[head : len(source) - tail] for factor in row)
    dims = target[head : len(target) - tail]
    foreign = all(factor.step is None for factor in middle)
    poured = [[Factor(size)] for size in dims] if foreign else _pour(middle, dims)
    return refold(rows[:head] + poured + rows[len(source) - tail :], old.start)


def _common(left: Shape, right: Shape) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(left), len(right)))


def _pour(stack: list[Factor], dims: Shape) -> list[list[Factor]]:
    """Distribute factors over dims from the fastest; the products are known to be equal."""
    rows: list[list[Factor]] = []
    for k in reversed(range(1, len(dims))):
        row: list[Factor] = []
        need: Size = dims[k]
        while need != 1:
            need = _take(stack, row, need, product(dims[:k]))
        rows.append(row[::-1])
    return [stack, *reversed(rows)] if dims else []


def _take(stack: list[Factor], row: list[Factor], need: Size, rest: Size) -> Size:
    """Move the fastest factor, or the part of it that fits, into ``row``; what is still needed."""
    if not stack:
        raise Untrackable("the view's sizes cannot be matched with those before it")
    factor = stack.pop()
    if (left := quotient(need, factor.size)) is not None:
        row.append(factor)
        return left
    remaining = quotient(factor.size, need)
    if remaining is None and not stack and not row:
        remaining = rest  # one factor fills all dims that are left, so no proof is needed
    if remaining is None:
        raise Untrackable(f"the view cuts size {factor.size} into {need}, which is not whole")
    row.append(Factor(need, factor.step))
    stack.append(Factor(remaining, _times(factor.step, need)))
    return 1


def _times(step: Size | None, size: Size) -> Size | None:
    return None if step is None else tidy(step * size)
