"""Noticing that a tensor changed between two looks at it, without a copy of it."""

from __future__ import annotations

import torch
from torch import Tensor

_SAMPLES = 16
"""Positions along each axis that are compared."""


class Seen:
    """A tensor as it was. It is not copied.

    Writes that autograd sees count in its version. Others (through ``.data``, by fused optimizers,
    from outside of torch) show in a few of its numbers: an optimizer changes them all.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version, self.sample = tensor, _version(tensor), _sample(tensor).clone()

    def check(self) -> None:
        """
        Raises:
            RuntimeError: the tensor has changed, or its memory is gone.
        """
        if self._changed():
            raise RuntimeError(
                "the values of this tensor were left until somebody reads them, and cannot be had "
                f"any more: the tensor {tuple(self.tensor.shape)} that they come from has changed, "
                "by optimizer.step() perhaps. Read them before, x.clone() is enough; or leave "
                "FuseLossHead's lazy_logits off"
            )

    def _changed(self) -> bool:
        released = self.tensor.numel() > 0 and self.tensor.untyped_storage().nbytes() == 0
        if released or self.version != _version(self.tensor):
            return True
        now = _sample(self.tensor)
        same = (now == self.sample) | ((now != now) & (self.sample != self.sample))
        return not bool(same.all())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> Tensor:
    steps = (slice(None, None, max(1, size // _SAMPLES)) for size in tensor.shape)
    with torch.no_grad():
        return tensor[tuple(steps)]
