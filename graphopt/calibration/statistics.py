"""What calibration keeps of the inputs of a product: sums over all rows of all samples."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Statistics:
    """Sums over rows ``x (..., K)``.

    Attributes:
        moment: ``(K, K)``, float32: the sum of ``x x.T``. For ``y = x @ W.T`` the squared error of
            y that an error E of W makes is ``(E @ moment * E).sum()``.
        magnitude: ``(K,)``, float32: the sum of ``|x|``.
        largest: ``(K,)``, float32: the largest ``|x|``.
        spike: ``(K,)``, float32: the row that holds the largest ``|x|``.
        rows: how many there were.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.moment = torch.zeros(width, width, device=device)
        self.magnitude = torch.zeros(width, device=device)
        self.largest = torch.zeros(width, device=device)
        self.spike = torch.zeros(width, device=device)
        self.rows = 0

    @classmethod
    def of(
        cls, samples: Iterable[Tensor], importance: Iterable[Tensor] | None = None
    ) -> Statistics:
        """Of tensors ``(..., K)``, with what each of their rows ``(...)`` counts.

        Raises:
            ValueError: there is none; or one holds NaN or infinity, and is named by its number.
        """
        found: Statistics | None = None
        counts = None if importance is None else iter(importance)
        for index, sample in enumerate(samples):
            found = found or cls(sample.shape[-1], sample.device)
            if not found.add(sample, None if counts is None else next(counts)):
                raise ValueError(f"calibration[{index}] gives NaN or infinity")
        if found is None:
            raise ValueError("there are no calibration inputs")
        return found

    def add(self, sample: Tensor, importance: Tensor | None = None) -> bool:
        """Add rows; false where they are not finite, and then nothing is added."""
        rows = sample.detach().reshape(-1, sample.shape[-1]).to(torch.float32)
        size = rows.abs()
        if not size.sum().isfinite():
            return False
        self.magnitude += size.sum(0)
        if len(rows):
            highest = size.amax(1)
            if highest.max() > self.largest.max():
                self.spike = rows[highest.argmax()].clone()
            torch.maximum(self.largest, size.amax(0), out=self.largest)
        if importance is not None:
            rows = rows * importance.reshape(-1, 1).to(rows).sqrt()
        self.moment.addmm_(rows.t(), rows)
        self.rows += len(rows)
        return True
