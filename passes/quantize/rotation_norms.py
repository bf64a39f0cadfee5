"""Norms made such that a rotation passes through them: RMS norms without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphopt.passes.composites.norms import RecognizeLayerNorm, RecognizeRMSNorm
from graphopt.passes.fold_constants import FoldCone
from graphopt.passes.fold_norm_affine import FoldAffine
from graphopt.passes.pre_rms_norm import CentreStream
from graphopt.passes.quantize.stage import Stage
from graphopt.rewrite import Pass, Profit, Rule


@dataclass(frozen=True)
class Prepared(Stage):
    """An exact step that makes room for others, whatever it gains by itself.

    Attributes:
        kinds: of its rules.
    """

    kinds: tuple[Callable[[], Rule], ...]

    def rules(self) -> Sequence[Rule]:
        made = [kind() for kind in self.kinds]
        for rule in made:
            rule.profit = Profit.ALWAYS
        return made


RECOGNISED: Sequence[tuple[Callable[[], Rule], ...]] = (
    (FoldCone,),  # scales written as one more than a weight
    (RecognizeLayerNorm, RecognizeRMSNorm),
)


def recognised(given: Pass) -> Sequence[Pass]:
    """Norms as the operators they are, with their scales."""
    return [Prepared(given, kinds) for kinds in RECOGNISED]


def before_rotating(given: Pass) -> Sequence[Pass]:
    """Norms as RMS norms without scales, where that can be."""
    return [Prepared(given, kinds) for kinds in (*RECOGNISED, (FoldAffine,), (CentreStream,))]
