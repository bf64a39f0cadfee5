"""Loss heads: a large product and the row summaries on it, without the product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphopt.passes.loss_head.filtered import FuseFilteredRowSummaries
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
        lazy_logits: where logits are an output besides, return a tensor that computes them when
            somebody reads it. Reading it after its weights changed is an error.
        chunk_bytes: memory for one chunk of the product, of one row at least; default: what stays
            in cache on a CPU, 256 MiB elsewhere.
        filter_gradients: leave out slopes below ``2^-12`` of their row's largest: gradients are
            approximate then, and held to that; results are not. Where that does not hold on the
            inputs at hand, gradients stay exact, and the report says why.
        min_bytes: products below this size are left alone.

    Raises:
        ValueError: ``drop_logits`` and ``lazy_logits`` at once; sizes that are none.
    """

    drop_logits: bool = False
    lazy_logits: bool = False
    chunk_bytes: int | None = None
    filter_gradients: bool = False
    min_bytes: int = 2**18

    def __post_init__(self) -> None:
        if self.drop_logits and self.lazy_logits:
            raise ValueError(
                "FuseLossHead: drop_logits returns None in place of logits, lazy_logits a tensor; "
                "give one of the two"
            )

        if self.chunk_bytes is not None:
            _check_bytes("chunk_bytes", self.chunk_bytes, 1)
        _check_bytes("min_bytes", self.min_bytes, 0)

    def concede(self, program: Program) -> None:
        if self.drop_logits:
            drop_logits(program, self.min_bytes)

    def axes(self, program: Program) -> Sequence[Sequence[Axis]]:
        return row_axes(program, self.min_bytes)

    def at_any_size(self) -> FuseLossHead:
        return replace(self, min_bytes=0)

    def rules(self) -> Sequence[Rule]:
        kinds = [FuseFilteredRowSummaries] if self.filter_gradients else []
        fuse = [
            kind(self.min_bytes, self.chunk_bytes, lazy_logits=self.lazy_logits)
            for kind in (*kinds, FuseRowSummaries)
        ]
        return (*SpellSummaries(self.min_bytes, self.lazy_logits).rules(), *fuse)


def _check_bytes(name: str, size: Any, least: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < least:
        raise ValueError(
            f"FuseLossHead: {name}={size!r} is no size; give a number of bytes, {least} or more"
        )
