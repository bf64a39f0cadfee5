"""Seconds of a GPU's work, without what the host takes to launch it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

_ROUNDS, _SLOW = 7, 4
"""How often a run is timed, and how many times the fastest takes what is timed once."""
_AHEAD = 1_000_000
"""Cycles that the GPU idles first, about half a millisecond: meanwhile the host launches."""


def device_quartiles(runs: list[Callable[[], object]]) -> list[float]:
    """Lower quartiles of seconds on the current GPU, runs taken in turn, with nothing in its L2.

    A layer's weight is not in L2 when the layer's turn comes; one that is timed again and again
    would be. Runs far slower than the fastest are timed once.
    """
    other = beside()
    for run in runs:
        run()
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS):
        fastest = min((min(taken) for taken in seconds if taken), default=math.inf)
        for run, taken in zip(runs, seconds, strict=True):
            if not taken or min(taken) < _SLOW * fastest:
                taken.append(device_seconds(run, other))
    return [sorted(taken)[len(taken) // 4] for taken in seconds]


def beside() -> torch.Tensor:
    """Memory that fills the current GPU's L2 when it is written; little where none is left."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        return torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return torch.empty(1, dtype=torch.uint8, device="cuda")


def device_seconds(run: Callable[[], object], other: torch.Tensor) -> float:
    """Of one run, after ``other``, which `beside` gave, is written."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    other.zero_()
    torch.cuda._sleep(_AHEAD)
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))
