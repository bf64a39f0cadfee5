"""Summaries of columns: ``log sum exp`` over all rows, to which pieces of rows add theirs.

``lse(x) = logaddexp(lse(x_1), lse(x_2))`` for ``x`` in two pieces (Milakov and Gimelshein 2018), in
any order: the same addition joins what several processes have of a column. Its slope in a piece is
``exp(x_1 - lse(x))`` times the cotangent, so backward needs ``lse(x)`` and no other piece.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_added(total: Tensor, matrix: Tensor) -> Tensor:
    """``total (V,)`` with the rows of ``matrix (n, V)``."""
    return torch.logaddexp(total, matrix.to(total.dtype).logsumexp(0))


def none_added(matrix: Tensor) -> Tensor:
    """The ``total (V,)`` of no rows, in float32 at least."""
    return matrix.new_empty(matrix.shape[1], dtype=_wide(matrix)).fill_(-torch.inf)


def slope_of(matrix: Tensor, total: Tensor, cotangent: Tensor) -> Tensor:
    """The gradient of ``matrix (n, V)`` for a cotangent ``(V,)`` of the total of all rows."""
    made = torch.sub(matrix, total).exp_().mul_(cotangent)
    return made.to(matrix.dtype)


def _wide(matrix: Tensor) -> torch.dtype:
    return torch.promote_types(matrix.dtype, torch.float32)
