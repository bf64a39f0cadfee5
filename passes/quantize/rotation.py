"""Method ``rotate``: exact rotations of residual streams and heads before weights are rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphopt.passes.quantize.plan import products_of
from graphopt.passes.quantize.rotation_heads import RotateHeads
from graphopt.passes.quantize.rotation_norms import before_rotating
from graphopt.passes.quantize.rotation_stream import RotateStream
from graphopt.passes.quantize.stage import Stage
from graphopt.program import Program
from graphopt.rewrite import Match, Pass, Rule


@dataclass(frozen=True)
class RotateBeforeQuantizing(Stage):
    """Rotates values that weights to be quantized write or read; exact but for rounding.

    Attributes:
        kind: of its rule, which takes the names of products to be quantized.
        quantized: finds these.
        products: their names, once they are known.
    """

    kind: Callable[[frozenset[str] | None], Rule]
    quantized: Callable[[Program], Sequence[Match]]
    products: frozenset[str] | None = None

    def options(self) -> dict[str, Any]:
        return {**super().options(), "method": "rotate"}

    def rules(self) -> Sequence[Rule]:
        return (self.kind(self.products),)

    def calibrated(
        self,
        program: Program,
        _samples: Sequence[Sequence[Any]],
        _progress: Callable[[str], None],
    ) -> Pass:
        names = {n.name for match in self.quantized(program) for n in products_of(match)}
        return replace(self, products=frozenset(names))


def rotating(given: Pass, quantized: Callable[[Program], Sequence[Match]]) -> Sequence[Pass]:
    """The stages of method ``rotate``."""
    kinds = (RotateHeads, RotateStream)
    return [*before_rotating(given), *(RotateBeforeQuantizing(given, k, quantized) for k in kinds)]
