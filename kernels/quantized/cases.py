"""What a call of the operators is, as far as that decides what runs it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphopt.kernels.quantized.scheme import Scheme


class Case(NamedTuple):
    """What decides which paths can run a call, and which is fast."""

    scheme: Scheme
    layout: str
    activations: str
    dtype: torch.dtype
    device: str
    outputs: int
    inputs: int

    @property
    def is_captured(self) -> bool:
        """Whether launches are being captured in a CUDA graph: nothing can be tried or timed."""
        return self.device == "cuda" and torch.cuda.is_current_stream_capturing()
