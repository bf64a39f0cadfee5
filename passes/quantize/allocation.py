"""Which of several formats each weight gets: the least loss for a size, and every trade between.

Losses of weights are taken to add up (Dong et al. 2020, "HAWQ-V2", section 3.2, where a loss is the
trace of a layer's Hessian times its squared error). The sets of formats that are best for some
price of a byte are the corners of the convex hull of all sets; they are found by taking one step at
a time, the one that gains most per byte, and any size between two corners is filled up in the same
order. For losses that fall by four with each bit this is the closed form of BAQ (2025, section 3):
bits are equal but for half the logarithm of a weight's sensitivity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple


class Choice(NamedTuple):
    """A format for one weight: its bytes, and the loss that it causes."""

    bytes: int
    loss: float


class Allocation(NamedTuple):
    """For each weight the position of its choice; bytes and loss of all together."""

    chosen: tuple[int, ...]
    bytes: int
    loss: float


def frontier(weights: Sequence[Sequence[Choice]]) -> Iterator[Allocation]:
    """Allocations from the smallest to the one of least loss, each by one step from the last.

    Steps gain less and less per byte, so that each is the best of its size among sums of choices on
    the convex hulls of weights; choices above these hulls are never taken.

    Raises:
        ValueError: a weight has no choice, or one whose bytes or loss is not a number from 0.
    """
    hulls = [_hull(choices) for choices in weights]
    steps = [0] * len(hulls)
    now = [weights[i][hull[0]] for i, hull in enumerate(hulls)]
    size, loss = sum(c.bytes for c in now), sum(c.loss for c in now)
    queue = [_step(weights[i], hull, i, 0) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapify(queue)
    yield Allocation(tuple(h[0] for h in hulls), size, loss)
    while queue:
        _, index, position = heappop(queue)
        hull, choices = hulls[index], weights[index]
        old, new = choices[hull[position]], choices[hull[position + 1]]
        size, loss = size + new.bytes - old.bytes, loss + new.loss - old.loss
        steps[index] = position + 1
        if position + 2 < len(hull):
            heappush(queue, _step(choices, hull, index, position + 1))
        yield Allocation(tuple(h[s] for h, s in zip(hulls, steps, strict=True)), size, loss)


def allocate(weights: Sequence[Sequence[Choice]], size: int) -> Allocation:
    """The allocation of least loss that the frontier has within a size.

    What is left of the size when the next step does not fit is filled by the steps that do.

    Raises:
        ValueError: the smallest allocation is larger; the message says how large.
    """
    points = frontier(weights)
    found = next(points)
    if found.bytes > size:
        raise ValueError(f"the smallest choices take {found.bytes} bytes together, not {size}")
    for point in points:
        if point.bytes > size:
            break
        found = point
    return _filled(weights, found, size)


def _filled(weights: Sequence[Sequence[Choice]], found: Allocation, size: int) -> Allocation:
    """Single changes that still fit, the ones that gain most first."""
    chosen, used, loss = list(found.chosen), found.bytes, found.loss
    while True:
        gains = (
            (weights[i][chosen[i]].loss - choice.loss, i, position)
            for i, choices in enumerate(weights)
            for position, choice in enumerate(choices)
            if used + choice.bytes - weights[i][chosen[i]].bytes <= size
        )
        gain, index, position = max(gains, default=(0.0, 0, 0))
        if gain <= 0:
            return Allocation(tuple(chosen), used, loss)
        used += weights[index][position].bytes - weights[index][chosen[index]].bytes
        chosen[index], loss = position, loss - gain


def _step(
    choices: Sequence[Choice], hull: Sequence[int], index: int, position: int
) -> tuple[float, int, int]:
    old, new = choices[hull[position]], choices[hull[position + 1]]
    return (new.loss - old.loss) / (new.bytes - old.bytes), index, position


def _hull(choices: Sequence[Choice]) -> list[int]:
    """Positions of the choices on the lower convex hull, from the smallest to the least loss."""
    if not choices or not all(c.bytes >= 0 and 0 <= c.loss < float("inf") for c in choices):
        raise ValueError("each weight has choices whose bytes and losses are numbers from 0")
    order = sorted(range(len(choices)), key=lambda i: (choices[i].bytes, choices[i].loss))
    kept: list[int] = []
    for i in order:
        if kept and choices[i].loss >= choices[kept[-1]].loss:
            continue
        while len(kept) > 1 and _above(choices[kept[-2]], choices[kept[-1]], choices[i]):
            kept.pop()
        kept.append(i)
    return kept


def _above(first: Choice, middle: Choice, last: Choice) -> bool:
    """Whether the middle one lies on or above the line between the others."""
    slope = (last.loss - first.loss) * (middle.bytes - first.bytes)
    return (middle.loss - first.loss) * (last.bytes - first.bytes) >= slope
