"""Gradient filtering: tiles of slopes that round to nothing are left out of the products.

After Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", section 4.3: a
tile counts where some slope exceeds ``threshold`` times the largest cotangent of its row, and
classes are sorted by mean logit so that the likely ones share tiles. What is left out is an error
of the gradients; the paper takes ``2^-12`` for bfloat16. For peaked predictions most tiles go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.kernels.cross_entropy.operands import Cotangents, Head
from graphopt.kernels.filtering import report


class Filter:
    """What one backward pass keeps.

    Attributes:
        order: classes from the likely to the unlikely, by mean logit before the soft-cap.
        bar: what a slope must exceed, per row.
        tile: rows and classes of a tile.
    """

    def __init__(self, head: Head, given: Cotangents, threshold: float, tile: int) -> None:
        mean = head.hidden.mean(0, dtype=torch.float32).to(head.weight.dtype)
        logits = head.weight @ mean
        logits = logits if head.bias is None else logits + head.bias
        self.order = logits.argsort(descending=True, stable=True)
        terms = (given.lse, given.target_logit, given.logit_sum, given.entropy)
        sizes = [term.abs() for term in terms if term is not None]
        self.bar = torch.stack(sizes).amax(0) * threshold
        self.tile = tile
        self._marks: list[Tensor] = []

    def marks(self, rows: int, width: int) -> Tensor:
        """Room for a mark for each tile of a panel."""
        size = (-(-rows // self.tile), -(-width // self.tile))
        self._marks.append(self.order.new_empty(size, dtype=torch.int32))
        return self._marks[-1]

    def report(self) -> None:
        """The share kept; all of nothing is 1."""
        kept = [m.flatten() for m in self._marks] or [self.bar.new_ones(1)]
        report(torch.cat(kept).float().mean())


def listed(kept: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of marks the columns marked 1, in order and first, and how many they are."""
    places = kept.argsort(dim=1, descending=True, stable=True).int().contiguous()
    return places, kept.sum(1, dtype=torch.int32)
