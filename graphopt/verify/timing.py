"""Does a rewrite pay here? Both versions of the piece timed in turn on the captured sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.rewrite.driver import Rewrite
from graphopt.rewrite.rule import Profit
from graphopt.rewrite.subgraph import Subgraph

PAIRS = 7
ATTEMPTS = 4
TOLERATED = 1.02
"""A rewrite within this ratio of the original's time is kept: it is not slower beyond noise."""


class Pace(NamedTuple):
    """Median seconds of the original and the new piece."""

    old: float
    new: float


class Stopwatch:
    """Times each distinct pair of pieces once; equal structures share the measurement."""

    def __init__(self, *, train: bool, budget: float = 0.25) -> None:
        self.train, self.budget = train, budget
        self.known: dict[tuple[str, str, str], Pace] = {}

    def __call__(
        self, rewrite: Rewrite, before: Sequence[Any], after: Sequence[Any]
    ) -> Pace | None:
        """How the two pieces compare; ``None`` where time is no question."""
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


def pays(pace: Pace | None) -> bool:
    """Whether the new piece is not slower beyond noise."""
    return pace is None or pace.new <= pace.old * TOLERATED


def interleaved(old: Callable[[], Any], new: Callable[[], Any], budget: float) -> Pace:
    """Time two callables in turn; short ones are repeated within ``budget`` seconds.

    Where the pairs disagree on which is faster, as on a busy machine, they are timed again.
    """
    first = max(_once(old, 1), _once(new, 1), 1e-7)
    repeat = min(max(1, int(budget / (2 * PAIRS) / first)), 200)
    rows: list[tuple[float, float]] = []
    for _ in range(ATTEMPTS):
        rows += [(_once(old, repeat), _once(new, repeat)) for _ in range(PAIRS)]
        slower = sum(n > o * TOLERATED for o, n in rows)
        if not len(rows) / 4 < slower < 3 * len(rows) / 4:
            break
    medians = (statistics.median(column) for column in zip(*rows, strict=True))
    return Pace(*medians)


def glance(old: Callable[[], Any], new: Callable[[], Any], budget: float) -> Pace:
    """Median times of two callables in turn, after one run of each, for about ``budget`` seconds:
    one pair at least, and no more than `PAIRS`."""
    _once(old, 1), _once(new, 1)
    start, rows = time.perf_counter(), list[tuple[float, float]]()
    while not rows or (len(rows) < PAIRS and time.perf_counter() - start < budget):
        rows.append((_once(old, 1), _once(new, 1)))
    return Pace(*(statistics.median(column) for column in zip(*rows, strict=True)))


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
