"""What is left of a weight beside its codes, and added to their product.

`Columns` are whole inputs in floats (Lee et al. 2024, "OWQ: Outlier-Aware Weight Quantization",
section 4), `Numbers` single ones, stored sparse (Kim et al. 2024, "SqueezeLLM", section 4.2), and
`LowRank` a product of two thin matrices (Yao et al. 2023, "ZeroQuant-V2", section 4, LoRC). Numbers
of float32 weights are stored as float16 where all of them fit its range: what a few bits leave over
is off by far more.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

_NAMED = re.compile(r"_(columns|numbers|lowrank)_(places|values|starts|left|right|mask)(_\d+)?$")
_SHORT = torch.iinfo(torch.int16).max


@dataclass(frozen=True, eq=False)
class Part(ABC):
    """A matrix ``(N, K)`` that is stored as less."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dense(self, width: int) -> Tensor:
        """The matrix, float32."""
        return self.product(torch.eye(width, device=next(iter(self.tensors.values())).device)).t()

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """``x (..., K)`` to ``(..., N)``, in the dtype of x."""

    @abstractmethod
    def __str__(self) -> str:
        """What is stored, for people."""


@dataclass(frozen=True, eq=False)
class Columns(Part):
    """``places (c,)``, int64, in rising order: inputs; ``values (N, c)``."""

    places: Tensor
    values: Tensor

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x.index_select(-1, self.places), self.values.to(x.dtype))

    def __str__(self) -> str:
        return f"{_count(len(self.places), 'column')} in {_bits(self.values)} bits"


@dataclass(frozen=True, eq=False)
class Numbers(Part):
    """Numbers of each output channel in turn (compressed sparse rows).

    ``values (n,)`` lie at inputs ``places (n,)``, int16 or int32; those of channel i begin at
    ``starts[i]``, int32 ``(N + 1,)``.
    """

    places: Tensor
    starts: Tensor
    values: Tensor

    @classmethod
    def of(cls, dense: Tensor, mask: Tensor) -> Numbers:
        """The numbers of ``(N, K)`` where the mask has them."""
        ends = mask.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        kind = torch.int16 if dense.shape[1] - 1 <= _SHORT else torch.int32
        return cls(mask.nonzero()[:, 1].to(kind), F.pad(ends, (1, 0)), dense[mask])

    def product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).t()
        values, places = self.values.to(x.dtype), self.places.to(torch.int32)
        made = F.embedding_bag(
            places,
            rows,
            self.starts,
            mode="sum",
            per_sample_weights=values,
            include_last_offset=True,
        )
        return made.t().reshape(*x.shape[:-1], len(self.starts) - 1)

    def __str__(self) -> str:
        return f"{_count(len(self.values), 'number')} in {_bits(self.values)} bits"


@dataclass(frozen=True, eq=False)
class LowRank(Part):
    """``left (N, r)`` times ``right (r, K)``."""

    left: Tensor
    right: Tensor

    def product(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.right.to(x.dtype)), self.left.to(x.dtype))

    def __str__(self) -> str:
        return f"a correction of rank {len(self.right)}"


def stored(values: Tensor, like: torch.dtype) -> Tensor:
    """Float32 numbers as they are kept beside a weight of a dtype."""
    values = values.contiguous()  # files hold whole tensors
    if like != torch.float32:
        return values.to(like)
    fits = not values.numel() or float(values.abs().max()) <= torch.finfo(torch.float16).max
    return values.to(torch.float16) if fits else values


def name(weight: str, part: Part, tensor: str) -> str:
    """What a tensor of a part is called in the state of a program."""
    return f"{weight}_{type(part).__name__.lower()}_{tensor}"


def weight_beside(held: str, names: Container[str]) -> str | None:
    """The weight beside whose codes a tensor stands, going by names of state."""
    base = _NAMED.sub("", held)
    return base if base != held and f"{base}_codes" in names else None


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _bits(values: Tensor) -> int:
    return 8 * values.element_size()
