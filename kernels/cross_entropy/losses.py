"""Cross entropy per row, from the summaries of `cross_entropy_rows`."""

from __future__ import annotations

from torch import Tensor

from graphopt.kernels.cross_entropy.autograd import cross_entropy_rows


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    filter_threshold: float = 0.0,
) -> Tensor:
    """``(N,)`` losses in float32, zero where the target is ignored; to be reduced by the caller.

    With logits ``z``, smoothing ``s`` and ``Z = logsumexp(z)`` a loss is
    ``Z - (1 - s) z[target] - s mean(z) + z_loss Z^2``.

    Args:
        filter_threshold: above zero, gradients are approximate, see `filtering`.
    """
    smooth = label_smoothing > 0
    lse, own, total, _, _ = cross_entropy_rows(
        hidden, weight, target, bias, softcap, ignore_index, smooth, False, False, filter_threshold
    )
    loss = lse - (1 - label_smoothing) * own
    if smooth:
        loss = loss - label_smoothing / weight.shape[0] * total
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss.where(target != ignore_index, 0.0)
