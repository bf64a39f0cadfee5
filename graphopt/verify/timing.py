"""Does a rewrite pay here? Both versions of the piece timed in turn on the captured sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.rewrite.driver import Rewrite
from graphopt.rewrite.rule import Profit
from graphopt.rewrite.subgraph import Subgraph

PAIRS = 7
TOLERATED = 1.02
"""A rewrite within this ratio of the original's time is kept: it is not slower beyond noise."""


class Stopwatch:
    """Times each distinct pair of pieces once; equal structures share the measurement."""

    def __init__(self, *, train: bool, budget: float = 0.25) -> None:
        self.train, self.budget = train, budget
        self.known: dict[tuple[str, str, str], tuple[float, float]] = {}

    def __call__(
        self, rewrite: Rewrite, before: Sequence[Any], after: Sequence[Any]
    ) -> tuple[float, float] | None:
        """Median seconds of the original and the new piece; ``None`` where time is no question."""
        if rewrite.rule.profit is Profit.ALWAYS:
            return None
        key = (rewrite.rule.name, rewrite.before.structure, rewrite.after.structure)
        if key not in self.known:
            old, new = (
                self._runner(*p) for p in ((rewrite.before, before), (rewrite.after, after))
            )
            self.known[key] = interleaved(old, new, self.budget)
        return self.known[key]

    def _runner(self, piece: Subgraph, values: Sequence[Any]) -> Callable[[], Any]:
        module = piece.module
        if not self.train:
            return lambda: _forward(module, values)
        return lambda: _forward_backward(module, values)


def pays(seconds: tuple[float, float] | None) -> bool:
    """Whether the new time is not above the old beyond noise."""
    return seconds is None or seconds[1] <= seconds[0] * TOLERATED


def interleaved(
    old: Callable[[], Any], new: Callable[[], Any], budget: float
) -> tuple[float, float]:
    """Median seconds of two callables run in turn; short ones are repeated within ``budget``."""
    first = _once(old, 1), _once(new, 1)
    repeat = max(1, int(budget / (2 * PAIRS) / max(max(first), 1e-7)))
    repeat = min(repeat, 200)
    rows = [(_once(old, repeat), _once(new, repeat)) for _ in range(PAIRS)]
    return statistics.median(r[0] for r in rows), statistics.median(r[1] for r in rows)


def _once(call: Callable[[], Any], repeat: int) -> float:
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    _synchronize()
    return (time.perf_counter() - start) / repeat


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _forward(module: Callable[..., Any], values: Sequence[Any]) -> Any:
    with torch.no_grad():
        return module(*values)


def _forward_backward(module: Callable[..., Any], values: Sequence[Any]) -> None:
    leaves = [
        v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for v in values
    ]
    with torch.enable_grad():
        made = pytree.tree_leaves(module(*leaves))
        results = [r for r in made if isinstance(r, Tensor) and r.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.ones_like(r) for r in results])
