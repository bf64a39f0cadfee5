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
    device = torch.cuda.current_device()
    other = torch.empty(
        2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device="cuda"
    )
    for run in runs:
        run()
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS):
        fastest = min((min(taken) for taken in seconds if taken), default=math.inf)
        for run, taken in zip(runs, seconds, strict=True):
            if not taken or min(taken) < _SLOW * fastest:
                taken.append(_seconds(run, other))
    return [sorted(taken)[len(taken) // 4] for taken in seconds]


def _seconds(run: Callable[[], object], other: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    other.zero_()
    torch.cuda._sleep(_AHEAD)
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))
