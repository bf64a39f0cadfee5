"""What quantized layers before a weight cost, made good by the weight, before it is rounded.

Behind quantized layers the inputs of a product are x where they were x0. A weight W should still
give ``W x0``; the matrix that comes nearest to it on what there is to multiply is

    W' = W + a W D (H + d)^-1,    D = sum r^2 (x0 - x) x.T,    H = sum r^2 x x.T

with a = 1 and a small damping d (least squares; Arai & Ichikawa 2025, "Quantization Error
Propagation"; Li et al. 2025, "GPTAQ", solve the same problem column by column). W' takes the place
of W when codes are chosen. On few inputs it would learn what is peculiar to them: a, between 0 and
1, is what serves best where W' is made of one half of the inputs and judged on the other. r is 1,
or what a row counts by its `importance`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.calibration import Stream
from graphopt.kernels.quantized.gptq import damped
from graphopt.passes.quantize.observed import Observed, given_to
from graphopt.program import Program

DAMPING = 0.01
"""Share of the mean of H's diagonal, as `gptq` has it."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Over some of the rows, ``(K, K)`` each, float32."""

    drift: Tensor
    moment: Tensor

    def joined(self, other: Sums) -> Sums:
        return Sums(self.drift + other.drift, self.moment + other.moment)

    @cached_property
    def map(self) -> Tensor:
        """``D (H + d)^-1``, ``(K, K)``."""
        lower = torch.linalg.cholesky(damped(self.moment.double(), DAMPING))
        return torch.cholesky_solve(self.drift.double().t(), lower).t().to(torch.float32)


@dataclass(frozen=True, eq=False)
class Halves:
    """Of the rows of an input; weights that read it share what is solved of them."""

    first: Sums
    second: Sums

    def joined(self, other: Halves) -> Halves:
        return Halves(self.first.joined(other.first), self.second.joined(other.second))

    @cached_property
    def whole(self) -> Sums:
        return self.first.joined(self.second)

    def share(self, weight: Tensor) -> float:
        """The a for which the map of either half is best on the other: a quotient of quadratics."""
        gain = size = torch.zeros((), dtype=torch.float64)
        for own, other in ((self.first, self.second), (self.second, self.first)):
            moved = weight @ own.map
            gain = gain + (moved * (weight @ other.drift)).sum(dtype=torch.float64)
            size = size + (moved * (moved @ other.moment)).sum(dtype=torch.float64)
        share = float(gain / size) if size > 0 else 0.0
        return min(max(share, 0.0), 1.0)


class Propagation:
    """Runs the float model beside a quantized one, and keeps how far inputs of products have moved.

    Args:
        stream: of the program as it was, on the same samples; it stops at products.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.halves: dict[fx.Node, Halves | None] = {}

    @classmethod
    def of(
        cls, program: Program, samples: Sequence[Sequence[Any]], products: Iterable[fx.Node]
    ) -> Propagation:
        return cls(Stream(program, samples, list(products)))

    def look(self, product: fx.Node, quantized: Observed) -> None:
        """The stream of the quantized model has come to a product."""
        self.stream.advance(product)
        given = given_to(product)
        if given not in self.halves:
            now = list(quantized.stream.given(given))
            counts = quantized.importance.of(product, now) or repeat(None, len(now))
            rows = zip(self.stream.given(given), now, counts, strict=True)
            self.halves[given] = _halves(rows, len(now))

    def served(self, weight: Tensor, products: Iterable[fx.Node]) -> tuple[Tensor, str]:
        """W' of a weight ``(N, K)``, float32, and what there is to say of it."""
        found = [self.halves[given_to(n)] for n in products]
        known = [halves for halves in found if halves is not None]
        if len(known) < len(found) or not known:
            return weight, "its inputs are other rows than in the float model: nothing propagated"
        halves, wide = reduce(Halves.joined, known), weight.detach().to(torch.float32)
        share = halves.share(wide)
        if share == 0:
            return weight, ""
        moved = wide @ halves.whole.map * share
        return wide + moved, f"makes good {share:.0%} of what inputs lost before it"

    def keep(self, products: Iterable[fx.Node]) -> None:
        """Drop sums that these products do not need."""
        wanted = {given_to(n) for n in products}
        self.halves = {n: h for n, h in self.halves.items() if n in wanted}


Rows = tuple[Tensor, Tensor, Tensor | None]
"""What an input is in the float and in the quantized model ``(..., K)``, and what rows count, the
squares of r ``(...)``, where they do not count the same."""


def _halves(samples: Iterable[Rows], count: int) -> Halves | None:
    """Sums over an input; ``None`` where rows of both models do not correspond."""
    halves: list[Sums] | None = None
    for index, (before, now, counts) in _parts(samples, count):
        if before.shape != now.shape:
            return None
        rows = now.detach().flatten(0, -2).to(torch.float32)
        lost = before.detach().flatten(0, -2).to(torch.float32) - rows
        counted = rows if counts is None else rows * counts.reshape(-1, 1).to(rows)
        if halves is None:
            shape = (rows.shape[1], rows.shape[1])
            halves = [Sums(rows.new_zeros(shape), rows.new_zeros(shape)) for _ in range(2)]
        halves[index % 2].drift.addmm_(lost.t(), counted)
        halves[index % 2].moment.addmm_(rows.t(), counted)
    return None if halves is None else Halves(*halves)


def _parts(samples: Iterable[Rows], count: int) -> Iterator[tuple[int, Rows]]:
    """Samples in turn; the two halves of the rows where there is one sample alone."""
    if count > 1:
        yield from enumerate(samples)
        return
    for before, now, counts in samples:
        if before.shape != now.shape:
            yield 0, (before, now, counts)
            continue
        both = [x.flatten(0, -2).chunk(2) for x in (before, now)]
        shares = (None, None) if counts is None else counts.flatten().chunk(2)
        yield from enumerate(zip(*both, shares, strict=False))
