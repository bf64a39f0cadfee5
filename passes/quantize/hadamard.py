"""Rotations that spread every feature over all others: Hadamard matrices with random signs.

A Hadamard matrix of order n has entries of 1 and -1 and ``H @ H.T = n I``. Orders that are not
powers of two come from Paley's two constructions over fields of p or p squared elements (R. Paley
1933, "On orthogonal matrices"), times powers of two by Sylvester's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

SEED = 0
LARGEST = 2048
"""Largest order that is sought besides powers of two: it is multiplied as a matrix."""
CHUNK = 2**22
"""Numbers that are rotated at once, in float64."""


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix ``diag(signs) @ (sylvester x base) / sqrt(n)`` of order ``n``.

    Attributes:
        signs: ``(n,)``, 1 or -1; base: ``(m, m)`` with ``base @ base.T = m I``, where ``n`` is
            ``m`` times a power of two. Both float64.
        exact: base is a Hadamard matrix; where none is known it is a random one.
    """

    signs: Tensor
    base: Tensor
    exact: bool

    @property
    def order(self) -> int:
        return len(self.signs)

    def __call__(self, values: Tensor, axis: int = -1) -> Tensor:
        """Values with each vector along ``axis`` multiplied by the matrix from its right.

        Computed in float64 and rounded once, to the values' dtype.
        """
        moved = values.detach().movedim(axis, -1)
        rows = moved.reshape(-1, self.order)
        made = torch.empty_like(rows)
        step = max(1, CHUNK // self.order)
        for start in range(0, len(rows), step):
            made[start : start + step] = self._rows(rows[start : start + step].double())
        return made.view(moved.shape).movedim(-1, axis).contiguous()

    def _rows(self, rows: Tensor) -> Tensor:
        width = len(self.base)
        x = (rows * self.signs.to(rows.device)).view(len(rows), -1, width)
        x = x @ self.base.to(rows.device)
        half = 1
        while half < x.shape[1]:
            left, right = x.view(len(rows), -1, 2, half, width).unbind(2)
            x = torch.stack((left + right, left - right), 2).view(len(rows), -1, width)
            half *= 2
        return x.reshape(rows.shape) / math.sqrt(self.order)

    def matrix(self) -> Tensor:
        """``(n, n)``, float64: ``rotation(x) = x @ matrix``."""
        return self(torch.eye(self.order, dtype=torch.float64))


@cache
def rotation(order: int) -> Rotation:
    """The rotation of an order, always the same one."""
    generator = torch.Generator().manual_seed(SEED)
    signs = torch.randint(0, 2, (order,), generator=generator, dtype=torch.float64) * 2 - 1
    twos = order & -order
    width = order // twos
    for power in range(twos.bit_length()):
        base = hadamard(width << power)
        if base is not None:
            return Rotation(signs, base, exact=True)
    normal = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return Rotation(signs, torch.linalg.qr(normal).Q * math.sqrt(width), exact=False)


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix ``(n, n)``, float64, of order 1 or by Paley; ``None`` where that has none.

    Powers of two have one by Sylvester, which `Rotation` adds.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4 or order > LARGEST:
        return None
    if (order - 1) % 4 == 3 and (field := _residues(order - 1)) is not None:
        return _bordered(field, -1.0) + torch.eye(order, dtype=torch.float64)
    if (order // 2 - 1) % 4 == 1 and (field := _residues(order // 2 - 1)) is not None:
        core, one = _bordered(field, 1.0), torch.eye(order // 2, dtype=torch.float64)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, plus) + torch.kron(one, minus)
    return None


def _bordered(core: Tensor, below: float) -> Tensor:
    """A conference matrix: zeros on the diagonal, ``below`` down the first column."""
    made = torch.zeros(len(core) + 1, len(core) + 1, dtype=torch.float64)
    made[0, 1:], made[1:, 0], made[1:, 1:] = 1.0, below, core
    return made


def _residues(size: int) -> Tensor | None:
    """``(q, q)``: whether a - b is a square in the field of ``q`` elements (1), or not (-1)."""
    prime = math.isqrt(size)
    if _is_prime(size):
        index = torch.arange(size)
        return _squares(size)[(index[:, None] - index) % size]
    if prime * prime != size or not _is_prime(prime) or prime == 2:
        return None
    character = _squares(prime)
    # Elements a + b t with t * t = n, no square: one is a square where its norm a a - n b b is.
    n = int((character == -1).nonzero()[0])
    a, b = torch.arange(size) // prime, torch.arange(size) % prime
    over, beyond = a[:, None] - a, b[:, None] - b
    return character[(over * over - n * beyond * beyond) % prime]


def _squares(prime: int) -> Tensor:
    """``(p,)``: 1 for squares, -1 for others, 0 for zero."""
    made = -torch.ones(prime, dtype=torch.float64)
    made[torch.arange(prime) ** 2 % prime] = 1.0
    made[0] = 0.0
    return made


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
