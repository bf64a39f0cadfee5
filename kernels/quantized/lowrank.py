"""What rounding loses of a weight as a product of two thin matrices.

Without a second moment of the inputs it is the truncated singular value decomposition of the error
(Yao et al. 2023, "ZeroQuant-V2", section 4, LoRC). With one, ``H = L @ L.T``, that of ``E @ L`` is
truncated, so that the squared error of products is least: ``(E - A B) H (E - A B).T`` on the
diagonal (Zhang et al. 2024, "LQER", section 3.2; Saha et al. 2024, "CALDERA", section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.kernels.quantized.remainder import LowRank, stored

_OVER, _ITERATIONS = 16, 4
"""Ranks more than asked for, and steps, of the subspace iteration that large matrices take."""


def low_rank(
    error: Tensor, rank: int, factor: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> LowRank:
    """The best correction of an error ``(N, K)``, float32.

    Args:
        rank: at most ``min(N, K)``.
        factor: L, ``(K, K)``, lower triangular: the Cholesky factor of the second moment.
        dtype: of the weight; see `remainder.stored`.
    """
    seen = error if factor is None else error @ factor
    left, values, right = _leading(seen, rank)
    root = values.clamp(min=0).sqrt()
    left, right = left * root, right * root[:, None]
    if factor is not None:
        right = torch.linalg.solve_triangular(factor, right, upper=False, left=False)
    return LowRank(*(stored(part, dtype) for part in _even(left, right)))


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors ``(N, r)``, values ``(r,)`` and right ones ``(r, K)``, largest first."""
    count = rank + _OVER
    if 4 * count >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    start = torch.Generator(matrix.device).manual_seed(0)
    basis = torch.randn(matrix.shape[1], count, generator=start, device=matrix.device)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix.t() @ torch.linalg.qr(matrix @ basis)[0])[0]
    left, values, right = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return left[:, :rank], values[:rank], (right @ basis.t())[:rank]


def _even(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors with the same largest number, channel of the rank by channel."""
    sizes = left.abs().amax(0), right.abs().amax(1)
    ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), (sizes[1] / sizes[0]).sqrt(), 1.0)
    return left * ratio, right / ratio[:, None]
