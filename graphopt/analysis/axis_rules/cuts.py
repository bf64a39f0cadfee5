"""Operations that choose positions of a dim by number: select, slice, split, flip, pad, tril."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from graphopt.analysis.axis_rules.call import Call, Mix, Outcome, rule
from graphopt.analysis.axis_rules.cut import flip, narrow, select
from graphopt.analysis.axis_rules.labels import Term, combine
from graphopt.analysis.axis_rules.placement import Placement
from graphopt.analysis.axis_rules.sizes import Size, Untrackable, at_least, tidy
from graphopt.analysis.axis_rules.views import Change, dims_of, on_axis, relocate

_LARGE = 2**62  # an end beyond every tensor: how "to the end" is spelled


def from_front(call: Call, value: Any, extent: Size) -> Size:
    """A position argument counted from the front of a dim of ``extent``; ``None`` is 0."""
    position = 0 if value is None else call.size(value)
    if at_least(position, 0):
        return position
    if isinstance(position, int):
        front = tidy(extent + position)
        return max(front, 0) if isinstance(front, int) else front
    raise Untrackable(f"the sign of position {position} is not known")


@rule("select.int")
def pick(call: Call) -> Outcome:
    """One position of ``dim``, which goes: the axis is pinned to one index if it lives there."""
    (dim,) = dims_of(call, call["dim"])
    index = from_front(call, call["index"], call.shape(call.main)[dim])
    return relocate(call, _selecting(call, dim, index), as_is=not on_axis(call, dim))


@rule("unbind.int")
def unbind(call: Call) -> Outcome:
    (dim,) = dims_of(call, call["dim"])
    changes = [_selecting(call, dim, k) for k in range(len(call.results))]
    return relocate(call, *changes, as_is=not on_axis(call, dim))


def _selecting(call: Call, dim: int, index: Size) -> Change:
    dims = {k: k - (k > dim) for k in range(call.rank(call.main)) if k != dim}
    return lambda place: select(place, dim, index).moved(dims)


@rule("slice.Tensor", "narrow")
def slice_(call: Call) -> Outcome:
    (dim,) = dims_of(call, call["dim"])
    extent, count = call.shape(call.main)[dim], call.results[0][dim]
    stride = call.size(call.get("step", default=1))
    begin = _slice_begin(call, extent, count)
    if count == extent and stride == 1:
        return relocate(call, lambda place: place, as_is=not on_axis(call, dim))
    change: Change = lambda place: narrow(place, dim, begin, count, stride)  # noqa: E731
    return relocate(call, change, as_is=not on_axis(call, dim))


def _slice_begin(call: Call, extent: Size, count: Size) -> Size:
    begin = from_front(call, call["start"], extent)
    if not at_least(begin, 0) and tidy(_slice_end(call, extent) - begin) != count:
        raise Untrackable(f"whether the slice begins before position 0 depends on {extent}")
    return begin


def _slice_end(call: Call, extent: Size) -> Size:
    end = call.get("end")
    if end is None or (isinstance(end, int) and end >= _LARGE):
        return extent
    return from_front(call, end, extent)


@rule("split.Tensor", "split.sizes", "split_with_sizes", "chunk", "unsafe_chunk",
      "unsafe_split.Tensor", "unsafe_split_with_sizes", "tensor_split.sections",
      "tensor_split.indices")  # fmt: skip
def split(call: Call) -> Outcome:
    (dim,) = dims_of(call, call["dim"])
    counts = [shape[dim] for shape in call.results]
    begins = accumulate(counts, lambda a, b: tidy(a + b), initial=0)
    changes = [_narrowing(dim, begin, count) for begin, count in zip(begins, counts, strict=False)]
    return relocate(call, *changes, as_is=not on_axis(call, dim))


def _narrowing(dim: int, begin: Size, count: Size) -> Change:
    return lambda place: narrow(place, dim, begin, count)


@rule("flip", "fliplr", "flipud")
def reverse(call: Call) -> Outcome:
    named = {"fliplr": [1], "flipud": [0]}.get(call.op)
    dims = dims_of(call, call.get("dims", default=named))
    return relocate(call, lambda place: flip(place, dims), as_is=not on_axis(call, *dims))


@rule("roll")
def roll(call: Call) -> Outcome:
    """Rotation of dims: along the axis it moves positions round the end."""
    dims = dims_of(call, call["dims"]) or tuple(range(call.rank(call.main)))
    return shuffled(call, dims, "positions are rotated along the axis")


def shuffled(call: Call, dims: Sequence[int], reason: str) -> Outcome:
    """The identity, except that the axis is lost where it lives in ``dims``."""
    names = [*range(call.rank(call.main))]
    source = ["in" if dim in dims else dim for dim in names]
    target = ["out" if dim in dims else dim for dim in names]
    outcome = combine(call, [Term(call.main, source)], [target])
    return replace(outcome, mix=outcome.mix and Mix("reindex", reason))


@rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
      "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(call: Call) -> Outcome:
    """Constants around the axis belong to no index; copies of its ends move positions."""
    widths = [call.size(value) for value in call.get("pad", "padding")]
    rank = call.rank(call.main)
    begins = {rank - 1 - k: widths[2 * k] for k in range(len(widths) // 2)}
    dims = [d for d in begins if call.shape(call.main)[d] != call.results[0][d] or begins[d] != 0]
    mode = call.get("mode", default="constant" if "nd" in call.op else "copy")
    if mode != "constant":
        return shuffled(call, dims, f"padding with mode {mode!r} copies positions of the axis")

    def change(place: Placement) -> Placement:
        for dim in dims:
            place = narrow(place, dim, tidy(-begins[dim]), call.results[0][dim])
        return place

    return relocate(call, change, as_is=not on_axis(call, *dims))


@rule("tril", "triu")
def triangle(call: Call) -> Outcome:
    """Elementwise by position: a slice of the last two dims needs another diagonal."""
    names = [*range(call.rank(call.main))]
    return combine(call, [Term(call.main, names)], [names], fixed=names[-2:])


@rule("diagonal")
def diagonal(call: Call) -> Outcome:
    """Position ``k`` of the last dim reads ``dim1`` and ``dim2`` at ``k``, one of them shifted."""
    dims = dims_of(call, [call["dim1"], call["dim2"]])
    begins = dict(zip(dims, (max(-call["offset"], 0), max(call["offset"], 0)), strict=True))
    rest = [dim for dim in range(call.rank(call.main)) if dim not in dims]
    targets = {dim: k for k, dim in enumerate(rest)} | dict.fromkeys(dims, len(rest))

    def change(place: Placement) -> Placement:
        if set(dims) <= set(place.dims):
            raise Untrackable("two dims of the axis meet on one diagonal")
        for dim, begin in begins.items():
            place = narrow(place, dim, begin, call.results[0][-1])
        return place.moved(targets)

    return relocate(call, change, as_is=not on_axis(call, *dims))
