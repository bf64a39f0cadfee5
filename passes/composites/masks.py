"""Masks of hand-written attention as one ``attn_mask``, and what becomes of rows they hide.

``softmax`` makes a row of ``-inf`` NaN and a row of equal huge values uniform; the composite makes
the first zero, and the backward of its fused kernel is wrong for the second.
So it matters whether a mask can hide a row entirely, and how.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.passes.composites.bounds import MODERATE, bounds
from graphopt.passes.composites.diagonal import INDEX, diagonal
from graphopt.passes.composites.expressions import is_call
from graphopt.passes.composites.scores import HIDDEN, Bias, Floor, Keep, Mask
from graphopt.passes.composites.triangle import Triangle, fill_of, triangle
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Refusal

aten = torch.ops.aten

ABSORBING = -1e9
"""Added to a score, a value this low leaves nothing of it in float32."""


@dataclass(frozen=True)
class Masking:
    """How masks are to be expressed.

    Attributes:
        causal: the one mask is the causal triangle.
        visible: every row provably sees a key.
        lowest: lower bound of what is added to a score.
    """

    keeps: tuple[Keep, ...] = ()
    biases: tuple[Bias, ...] = ()
    floor: float = -math.inf
    causal: bool = False
    visible: bool = True
    lowest: float = 0.0

    @property
    def empty(self) -> bool:
        return not self.keeps and not self.biases

    @property
    def logical(self) -> bool:
        """Expressible as a boolean mask."""
        infinite = all(k.fill == -math.inf for k in self.keeps) and self.floor == -math.inf
        return bool(self.keeps) and not self.biases and (self.visible or infinite)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (*(k.condition for k in self.keeps), *(b.value for b in self.biases))


def read_masks(
    program: Program, masks: Sequence[Mask], rows: Any, columns: Any, *, assume_visible: bool
) -> Masking | Refusal:
    """Decide how masks on ``(..., rows, columns)`` scores are expressed; masks innermost first."""
    keeps = tuple(m for m in masks if isinstance(m, Keep))
    biases = tuple(m for m in masks if isinstance(m, Bias))
    floor = max((m.value for m in masks if isinstance(m, Floor)), default=-math.inf)
    if refusal := _unfit(keeps, biases):
        return refusal
    if len(masks) == 1 and statically_known_true(rows == columns) and _is_causal(program, masks[0]):
        return Masking(keeps, biases, causal=True)
    fits = statically_known_true(rows <= columns)
    visible = assume_visible or (fits and all(_shows_diagonal(program, m) for m in masks))
    lowest = max(_lowest(program, keeps, biases), floor)
    found = Masking(keeps, biases, floor, False, visible, lowest)
    return _hidden_rows(program, found) or found


def _unfit(keeps: Sequence[Keep], biases: Sequence[Bias]) -> Refusal | None:
    for keep in keeps:
        if val(keep.condition).dtype is not torch.bool:
            return Refusal("the mask is not boolean", keep.condition)
        if keep.fill > HIDDEN:
            return Refusal(
                f"hidden scores become {keep.fill:g}, which still counts", keep.condition
            )
    for bias in biases:
        if not val(bias.value).dtype.is_floating_point:
            return Refusal("an integer mask is added to the scores", bias.value)
    return None


def _hidden_rows(program: Program, masking: Masking) -> Refusal | None:
    if masking.visible or masking.lowest >= -MODERATE:
        return None
    culprit, option = masking.nodes[0], "RecognizeComposites:assume_visible=True"
    fills = [k.fill for k in masking.keeps]
    if any(math.isfinite(f) and f > ABSORBING for f in fills):
        reason = f"the mask may hide a row entirely, and {max(fills):g} does not drown its scores"
        return Refusal(reason, culprit, option)
    if not program.frozen and not masking.logical:
        reason = "the mask may hide a row entirely: the fused kernel's gradient is wrong there"
        return Refusal(reason, culprit, option)
    return None


def _lowest(program: Program, keeps: Sequence[Keep], biases: Sequence[Bias]) -> float:
    added = 0.0
    for bias in biases:
        low, high = bounds(program, bias.value)
        added += low if bias.sign > 0 else -high
    return min([added, *(k.fill for k in keeps)])


def _shows_diagonal(program: Program, mask: Mask) -> bool:
    if isinstance(mask, Floor):
        return True
    if isinstance(mask, Keep):
        seen = diagonal(program, mask.condition)
        return seen not in (None, INDEX) and bool(seen) is mask.when
    low, high = bounds(program, mask.value)
    if (low if mask.sign > 0 else -high) >= -MODERATE:
        return True
    added = diagonal(program, mask.value)
    return added not in (None, INDEX) and mask.sign * added >= -MODERATE


def _is_causal(program: Program, mask: Mask) -> bool:
    if isinstance(mask, Keep):
        found = triangle(program, mask.condition)
        return found is (Triangle.LOWER if mask.when else Triangle.UPPER)
    if isinstance(mask, Floor) or mask.sign < 0:
        return False
    fill = fill_of(program, mask.value)
    hides = fill is not None and fill <= HIDDEN
    return hides and triangle(program, mask.value) is Triangle.UPPER


def build_mask(masking: Masking, dtype: torch.dtype, build: Builder) -> fx.Node:
    """One ``attn_mask``: boolean where that says it all, else floating of the given dtype."""
    conditions = [_shown(k, build) for k in masking.keeps]
    if masking.logical:
        mask = conditions[0]
        for other in conditions[1:]:
            mask = build(aten.logical_and.default, mask, other)
        return mask
    total = _total(masking, dtype, build)
    for condition, keep in zip(conditions, masking.keeps, strict=True):
        fill = max(keep.fill, masking.floor)
        total = build(aten.where.ScalarOther, condition, total, fill)
    return total


def _shown(keep: Keep, build: Builder) -> fx.Node:
    if keep.when:
        return keep.condition
    if is_call(keep.condition, aten.logical_not.default, aten.bitwise_not.default):
        return keep.condition.args[0]
    return build(aten.logical_not.default, keep.condition)


def _total(masking: Masking, dtype: torch.dtype, build: Builder) -> fx.Node:
    if not masking.biases:
        return build(aten.zeros_like.default, masking.keeps[0].condition, dtype=dtype)
    total = None
    for bias in masking.biases:
        part = bias.value if bias.sign > 0 else build(aten.neg.default, bias.value)
        if bias.lead is not None:
            matrix = [build.size(part, -2), build.size(part, -1)]
            part = build(aten.reshape.default, part, [*bias.lead, *matrix])
        total = part if total is None else build(aten.add.Tensor, total, part)
    if masking.floor > -math.inf:
        total = build(aten.clamp.default, total, masking.floor)
    return total


def restore_nan(masking: Masking, mask: fx.Node, value: fx.Node, build: Builder) -> fx.Node:
    """NaN in the rows of ``value`` that an infinite mask hides entirely, as softmax gives it."""
    if masking.visible or masking.lowest > -math.inf:
        return value
    if masking.logical:
        hidden = build(aten.logical_not.default, build(aten.any.dim, mask, -1, True))
    else:
        hidden = build(aten.all.dim, build(aten.eq.Scalar, mask, -math.inf), -1, True)
    return build(aten.masked_fill.Scalar, value, hidden, math.nan)
