"""Sliding windows along one dim: the cases in which positions stay apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.analysis.axis_rules.labels import Label
from graphopt.analysis.axis_rules.sizes import Size, product


@dataclass(frozen=True)
class Window:
    """A window that slides along dim ``k``: names and sizes of that dim before and after.

    Windows that tile the dim read block ``s`` at ``r`` and write ``s``; a window of one position
    is such a tile. Any other window lets positions meet: ``in`` goes, ``out`` comes.
    """

    before: tuple[tuple[Label, Size], ...]
    after: tuple[tuple[Label, Size], ...]


def window(k: int, source: Size, target: Size, kernel: Any, *rest: Any) -> Window:
    """The window of dim ``k``.

    Args:
        source: the size of the dim before, ``target``: after.
        kernel: positions in the window.
        rest: stride, padding, dilation; a stride of ``None`` is the kernel's size.
    """
    stride, padding, dilation = rest
    gapless = dilation == 1 or kernel == 1
    tiles = (stride or kernel) == kernel and padding == 0 and gapless
    if tiles and source == product((target, kernel)):
        return Window(((("s", k), target), (("r", k), kernel)), ((("s", k), target),))
    return slide(k, source, target)


def slide(k: int, source: Size, target: Size) -> Window:
    """A window about which nothing more is known."""
    return Window(((("in", k), source),), ((("out", k), target),))


def per_dim(value: Any, rank: int) -> list[Any]:
    """A setting per spatial dim: one number stands for all; an empty list is "not given"."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        return [None] * rank
    return values * rank if len(values) == 1 else values
