"""Gradient filtering: how much of the gradient products backward passes kept.

After Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", section 4.3:
slopes that round to nothing are left out of the products that make gradients of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

THRESHOLD = 2.0**-12
"""What the paper takes: below it, bfloat16 adds nothing to a sum of one."""

_listeners: list[list[Tensor]] = []


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """The share of the products kept, a number for each filtered backward pass inside.

    Where an operator takes its gradients in the forward pass, that is when it tells.
    """
    shares: list[Tensor] = []
    _listeners.append(shares)
    try:
        yield shares
    finally:
        _listeners[:] = [listening for listening in _listeners if listening is not shares]


def report(share: Tensor) -> None:
    """Tell all who listen; backward passes run in threads of their own."""
    for shares in _listeners:
        shares.append(share)
