"""Where an axis lives in a tensor: a quasi-affine map from positions to indices of the axis.

A view can fold the axis into another dim (``(B, S, D) -> (B*S, D)``), split it over two
(``S -> (S/w, w)``), shift it (``x[:, 1:]``) or pin it to one index (``x[:, 0]``). One formula
covers all of these. A `Leg` says that one dim holds one digit of the axis index, and

    index(position) = start + sum over legs of step * ((position[dim] // inner) % size)

A position whose index falls outside the axis (padding) depends on no index at all. A placement
without legs is pinned: the whole tensor belongs to index ``start``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import sympy

from graphopt.analysis.axis_rules.sizes import Size, tidy


@dataclass(frozen=True)
class Leg:
    """One digit of the axis: dim ``dim``, of ``outer * size * inner`` positions, holds it.

    ``step`` is what one increment of the digit adds to the axis index.
    """

    dim: int
    size: Size
    step: Size = 1
    outer: Size = 1
    inner: Size = 1

    @property
    def whole(self) -> bool:
        """The dim holds this digit and nothing else."""
        return self.outer == 1 and self.inner == 1


@dataclass(frozen=True)
class Placement:
    """An axis in one tensor. Legs are ordered by dim, within a dim from the slowest digit on."""

    legs: tuple[Leg, ...] = ()
    start: Size = 0

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(leg.dim for leg in self.legs))

    @property
    def dim(self) -> int | None:
        """The dim that is exactly the axis, or part of it in order; ``None`` if there is none."""
        return self.legs[0].dim if len(self.legs) == 1 and self.legs[0].whole else None

    @property
    def pinned(self) -> bool:
        return not self.legs

    def on(self, dim: int) -> tuple[Leg, ...]:
        return tuple(leg for leg in self.legs if leg.dim == dim)

    def moved(self, dims: Mapping[int, int]) -> Placement:
        """The same digits with the dims renamed; legs on dims that are not named are dropped."""
        legs = [replace(leg, dim=dims[leg.dim]) for leg in self.legs if leg.dim in dims]
        return replace(self, legs=tuple(sorted(legs, key=lambda leg: leg.dim)))

    def at(self, sizes: Mapping[sympy.Symbol, int]) -> Placement:
        """The placement with symbols replaced by numbers."""

        def concrete(value: Size) -> Size:
            return value if isinstance(value, int) else tidy(value.subs(sizes))

        legs = (
            Leg(leg.dim, *map(concrete, (leg.size, leg.step, leg.outer, leg.inner)))
            for leg in self.legs
        )
        return Placement(tuple(legs), concrete(self.start))

    def __str__(self) -> str:
        start = [str(self.start)] if self.start != 0 or self.pinned else []
        return " + ".join(start + [_digit(leg) for leg in self.legs])


def _digit(leg: Leg) -> str:
    position = f"p{leg.dim}"
    if leg.inner != 1:
        position = f"{position}//{leg.inner}"
    if leg.outer != 1:
        position = f"{position}%{leg.size}"
    return position if leg.step == 1 else f"{leg.step}*({position})"
