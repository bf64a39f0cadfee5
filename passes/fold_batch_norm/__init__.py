"""Norms with fixed statistics disappear into the layers beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.passes.fold_batch_norm.after import (
    NormAfterConv,
    NormAfterConvInGraph,
    NormAfterLinear,
    NormAfterLinearInGraph,
)
from graphopt.passes.fold_batch_norm.before import NormAfterNorm, NormBeforeConv, NormBeforeLinear
from graphopt.rewrite import Pass, Rule

__all__ = ["FoldBatchNorm"]


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNorm into convolutions and linears, after them and before them."""

    def rules(self) -> Sequence[Rule]:
        return (
            NormAfterConv(),
            NormAfterLinear(),
            NormAfterConvInGraph(),
            NormAfterLinearInGraph(),
            NormBeforeConv(),
            NormBeforeLinear(),
            NormAfterNorm(),
        )
