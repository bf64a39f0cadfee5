"""Loss heads: a large product and the row summaries on it, without the product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphopt.passes.loss_head.fuse import FuseRowSummaries, drop_logits, row_axes
from graphopt.passes.loss_head.prepare import SpellSummaries
from graphopt.program import Program
from graphopt.rewrite import Axis, Pass, Rule

__all__ = ["FuseLossHead"]


@dataclass(frozen=True)
class FuseLossHead(Pass):
    """Row summaries of large products (logits) are computed a chunk of rows at a time.

    Attributes:
        drop_logits: where logits are an output besides, return ``None`` in their place.
        chunk_bytes: memory for one chunk of the product; default: what stays in cache.
        min_bytes: products below this size are left alone.
    """

    drop_logits: bool = False
    chunk_bytes: int | None = None
    min_bytes: int = 2**18

    def concede(self, program: Program) -> None:
        if self.drop_logits:
            drop_logits(program, self.min_bytes)

    def axes(self, program: Program) -> Sequence[Sequence[Axis]]:
        return row_axes(program, self.min_bytes)

    def at_any_size(self) -> FuseLossHead:
        return replace(self, min_bytes=0)

    def rules(self) -> Sequence[Rule]:
        return (*SpellSummaries().rules(), FuseRowSummaries(self.min_bytes, self.chunk_bytes))
