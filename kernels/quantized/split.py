"""A weight as codes and a remainder that are found together.

``W = Q + S + A B``: codes Q (any way of rounding), S whole columns or single numbers in floats, and
``A B`` of low rank. S is chosen once, where rounding all of W costs most. Then Q is the rounded
form of what the others leave, ``A B`` and S are the best for what Q loses, and so on a few times
(the alternation of Saha et al. 2024, "CALDERA", section 3); the best of them is taken.

Columns in floats take up what rounding the others loses, as if they came last in GPTQ (Lee et al.
2024, "OWQ", section 4.2): Q and ``A B`` are found under the second moment that is left without them
(`outliers.without`), which is exact for every way of rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.quantized import outliers
from graphopt.kernels.quantized.gptq import damped
from graphopt.kernels.quantized.lowrank import low_rank
from graphopt.kernels.quantized.remainder import Columns, LowRank, Numbers, Part, stored
from graphopt.kernels.quantized.weight import QuantizedWeight

ROUNDS = 3
"""Times codes and a correction of low rank are found in turn."""
DAMPING = 0.01

Round = Callable[[Tensor, Tensor | None], QuantizedWeight]
"""Codes of a weight ``(N, K)``, given the second moment of its inputs where there is one."""


@dataclass(frozen=True)
class Beside:
    """What is wanted beside codes.

    Attributes:
        outliers: how much is kept in floats: a share if less than 1, else a count; ``None``:
            nothing. Super weights are kept in any case, with 0 they alone.
        kind: of what is kept: whole columns, or single numbers.
        rank: of the correction; ``None``: none.
    """

    outliers: float | None = None
    kind: Literal["columns", "numbers"] = "columns"
    rank: int | None = None

    def __bool__(self) -> bool:
        return self.outliers is not None or self.rank is not None


class Seen(NamedTuple):
    """Inputs of products: their second moment ``(K, K)``, and the row ``(K,)`` of the largest."""

    moment: Tensor
    spike: Tensor


@dataclass(frozen=True)
class Split:
    """Codes and what stands beside them."""

    weight: QuantizedWeight
    parts: Sequence[Part] = field(default_factory=tuple)
    super_weights: int = 0

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + sum(part.nbytes for part in self.parts)

    def dense(self) -> Tensor:
        """All of it, float32, ``(N, K)``."""
        made = self.weight.dequantize()
        return sum((part.dense(self.weight.width) for part in self.parts), made)


def split(
    weight: Tensor, round_: Round, wanted: Beside, seen: Seen | None = None, *, apart: bool = False
) -> Split:
    """A weight ``(N, K)`` as codes and what is wanted beside them.

    Args:
        seen: without it every input counts the same, and no super weight is found.
        apart: codes of columns in floats are never multiplied: their inputs are set to zero.
    """
    return _Search(weight.detach(), round_, wanted, seen, apart=apart).run()


class _Search:
    def __init__(
        self, weight: Tensor, round_: Round, wanted: Beside, seen: Seen | None, *, apart: bool
    ) -> None:
        self.weight, self.dtype = weight.to(torch.float32), weight.dtype
        self.round, self.wanted, self.apart = round_, wanted, apart
        self.given = self.moment = None if seen is None else _sized(seen.moment)
        self.always = (
            []
            if seen is None or wanted.outliers is None
            else (outliers.super_weights(self.weight, seen.spike))
        )
        self.places: Tensor | None = None
        self.mask: Tensor | None = None
        self._choose()
        self.factor = None
        if wanted.rank is not None and self.moment is not None:
            self.factor = torch.linalg.cholesky(damped(self.moment, DAMPING))

    def _choose(self) -> None:
        """Where S is, from what rounding all of the weight costs."""
        share = self.wanted.outliers
        if share is None or not (share or self.always):
            return
        plain = self.round(self.weight, self.moment).dequantize()
        cost = (self.weight - plain).square_()
        cost = cost if self.moment is None else cost * self.moment.diagonal()
        if self.wanted.kind == "numbers":
            self.mask = outliers.numbers(cost, _count(share, cost.numel()), self.always)
            return
        self.places = outliers.columns(cost, _count(share, cost.shape[1]), self.always)
        if self.moment is not None:
            self.moment = outliers.without(self.moment, self.places)

    def run(self) -> Split:
        best, least = None, torch.inf
        low: LowRank | None = None
        for _ in range(ROUNDS if self.wanted.rank else 1):
            made, low = self._once(low)
            lost = self._lost(made)
            if best is None or lost < least:
                best, least = made, lost
        assert best is not None  # there is a round
        return best

    def _once(self, low: LowRank | None) -> tuple[Split, LowRank | None]:
        left = self.weight if low is None else self.weight - self._dense(low)
        codes = self.round(self._emptied(left), self.moment)
        error = self.weight - self._read(codes)
        if self.wanted.rank:
            rank = min(self.wanted.rank, *error.shape)
            low = low_rank(self._emptied(error), rank, self.factor, self.dtype)
            error = error - self._dense(low)
        parts = [part for part in (self._kept(error), low) if part is not None]
        return Split(codes, parts, len(self.always)), low

    def _emptied(self, numbers: Tensor) -> Tensor:
        """Zero where S is."""
        if self.places is not None:
            return numbers.index_fill(1, self.places, 0.0)
        return numbers if self.mask is None else numbers.masked_fill(self.mask, 0.0)

    def _read(self, codes: QuantizedWeight) -> Tensor:
        """What codes come to in products."""
        numbers = codes.dequantize()
        return self._emptied(numbers) if self.apart and self.places is not None else numbers

    def _dense(self, part: Part) -> Tensor:
        return part.dense(self.weight.shape[1])

    def _kept(self, error: Tensor) -> Part | None:
        if self.places is not None:
            values = outliers.best_columns(error, self.places, self.given)
            return Columns(self.places, stored(values, self.dtype))
        if self.mask is None:
            return None
        values = outliers.best_numbers(error, self.mask, self.given)
        return Numbers.of(stored(values, self.dtype), self.mask)

    def _lost(self, made: Split) -> float:
        error = self.weight - self._read(made.weight) - sum(map(self._dense, made.parts))
        seen = error if self.given is None else error @ self.given
        return float((seen * error).sum())


def _sized(moment: Tensor) -> Tensor:
    """Damped, and 1 on the diagonal on average."""
    made = damped(moment.to(torch.float32), DAMPING)
    return made / made.diagonal().mean()


def _count(share: float, of: int) -> int:
    """A share of all, at least one of them if it is any; or a count."""
    return round(share) if share >= 1 or share == 0 else max(1, round(share * of))
