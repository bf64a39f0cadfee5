"""Hand-written compositions recognised as the operators they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.passes.composites.activations import (
    RecognizeGelu,
    RecognizeHardswish,
    RecognizeSilu,
)
from graphopt.passes.composites.attention import RecognizeAttention
from graphopt.passes.composites.grouped_heads import ShareGroupedHeads
from graphopt.passes.composites.norms import RecognizeLayerNorm, RecognizeRMSNorm
from graphopt.passes.composites.sigmoid import RecognizeSigmoid
from graphopt.passes.composites.softmax import RecognizeSoftmax
from graphopt.rewrite import Pass, Rule

__all__ = ["RecognizeComposites"]


@dataclass(frozen=True)
class RecognizeComposites(Pass):
    """Attention, norms, softmax and activations that were written out become one operator each.

    Attributes:
        assume_visible: no mask hides all keys from a query; spares the guard for rows that softmax
            makes NaN, and allows fused attention under masks of unknown values in training.
    """

    assume_visible: bool = False

    def rules(self) -> Sequence[Rule]:
        norms = (RecognizeLayerNorm(), RecognizeRMSNorm())
        sigmoids = (RecognizeSigmoid(), RecognizeSilu())
        activations = (RecognizeGelu(), *sigmoids, RecognizeHardswish())
        attention = RecognizeAttention(self.assume_visible)
        return (attention, ShareGroupedHeads(), RecognizeSoftmax(), *norms, *activations)
