"""Views that rearrange dims without choosing among positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from graphopt.analysis.axis_rules.call import Call, Carry, Outcome, State, rule
from graphopt.analysis.axis_rules.cut import repeat as repeat_dim
from graphopt.analysis.axis_rules.fold import reshape
from graphopt.analysis.axis_rules.labels import Term, combine
from graphopt.analysis.axis_rules.placement import Placement
from graphopt.analysis.axis_rules.sizes import product, quotient

Change = Callable[[Placement], Placement]


def relocate(call: Call, *changes: Change, as_is: bool = True) -> Outcome:
    """A view of the first argument: one change of placement per result."""
    state = call.state(call.main)
    return Outcome(tuple(_changed(state, change) for change in changes), as_is=as_is)


def _changed(state: State, change: Change) -> State:
    return state and Carry(tuple(dict.fromkeys(map(change, state.places))), state.pure)


def on_axis(call: Call, *dims: int) -> bool:
    """Whether the axis lives in one of ``dims`` of the first argument."""
    state = call.state(call.main)
    return state is not None and any(set(dims) & set(p.dims) for p in state.places)


def dims_of(call: Call, dims: int | Iterable[int]) -> tuple[int, ...]:
    """Dims of the first argument counted from the front."""
    rank = max(call.rank(call.main), 1)
    return tuple(dim % rank for dim in ([dims] if isinstance(dims, int) else dims))


def _fold(call: Call, *, as_is: bool) -> Outcome:
    source, target = call.shape(call.main), call.results[0]
    return relocate(call, lambda place: reshape(place, source, target), as_is=as_is)


@rule("unsqueeze", "squeeze.dim", "squeeze.dims")
def insert(call: Call) -> Outcome:
    """Dims of size one come and go; a squeezed dim that holds the axis must not become one."""
    dims = call["dim"] if isinstance(call["dim"], (list, tuple)) else [call["dim"]]
    squeezed = call.rank(call.main) >= len(call.results[0])
    return _fold(call, as_is=not (squeezed and on_axis(call, *dims_of(call, dims))))


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "flatten.using_ints", "unflatten.int",
      "view_as", "reshape_as", "ravel", "squeeze")  # fmt: skip
def view(call: Call) -> Outcome:
    """A row-major view; it can run on a slice only where it leaves the shape alone."""
    return _fold(call, as_is=False)


@rule("permute", "transpose.int", "t", "numpy_T", "mT", "mH", "adjoint", "matrix_H", "movedim.int",
      "movedim.intlist", "moveaxis.int", "moveaxis.intlist", "swapaxes", "swapdims")  # fmt: skip
def permute(call: Call) -> Outcome:
    """The order of dims, read off a run on a meta tensor whose sizes name its dims."""
    probe = torch.empty(tuple(range(1, call.rank(call.main) + 1)), device="meta")
    permuted: Any = call.node.target
    order = permuted(probe, *call.node.args[1:], **call.node.kwargs).shape
    return relocate(call, lambda place: place.moved({size - 1: k for k, size in enumerate(order)}))


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> Outcome:
    """New dims in front, dims of size one copied; ``-1`` keeps a dim whatever its size."""
    new = len(call.results[0]) - call.rank(call.main)
    sizes = call.get("size", default=())
    kept = [dim for dim in range(call.rank(call.main)) if sizes and sizes[dim + new] == -1]
    free = set(range(call.rank(call.main))) - set(kept)
    dims = {dim: dim + new for dim in range(call.rank(call.main))}
    return relocate(call, lambda place: place.moved(dims), as_is=not on_axis(call, *free))


@rule("repeat", "tile")
def repeat(call: Call) -> Outcome:
    times = [call.size(value) for value in call.get("repeats", "dims")]
    shape, rank = call.results[0], call.rank(call.main)
    source = (1,) * (len(shape) - rank) + call.shape(call.main)
    times = [1] * (len(shape) - len(times)) + times
    lift = {dim: dim + len(shape) - rank for dim in range(rank)}

    def change(place: Placement) -> Placement:
        place, grown = place.moved(lift), list(source)
        for dim, count in enumerate(times):
            place = repeat_dim(place, tuple(grown), dim, count, inside=False)
            grown[dim] = product((grown[dim], count))
        return place

    return relocate(call, change)


@rule("repeat_interleave.self_int")
def repeat_interleave(call: Call) -> Outcome:
    """Each position of ``dim`` repeated in place; without ``dim`` the tensor is flattened first."""
    dim, shape = call["dim"], call.shape(call.main)
    flat = shape if dim is not None else (product(shape),)
    axis = dims_of(call, dim)[0] if dim is not None else 0
    times = call.size(call["repeats"])
    return relocate(
        call,
        lambda place: repeat_dim(reshape(place, shape, flat), flat, axis, times, inside=True),
        as_is=dim is not None and call["output_size"] is None,
    )


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Outcome:
    """``(*, C*r*r, H, W) -> (*, C, H*r, W*r)``."""
    r, (*lead, _, h, w) = call["upscale_factor"], call.shape(call.main)
    names = [*range(len(lead))]
    channels = call.results[0][-3]
    source = Term(call.main, [*names, "c", "i", "j", "h", "w"], (*lead, channels, r, r, h, w))
    target = Term(None, [*names, "c", "h", "i", "w", "j"], (*lead, channels, h, r, w, r))
    return combine(call, [source], [target], fixed=("c", "i", "j"))


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Outcome:
    """``(*, C, H*r, W*r) -> (*, C*r*r, H, W)``."""
    r, (*lead, c, _, _) = call["downscale_factor"], call.shape(call.main)
    names, (h, w) = [*range(len(lead))], call.results[0][-2:]
    source = Term(call.main, [*names, "c", "h", "i", "w", "j"], (*lead, c, h, r, w, r))
    target = Term(None, [*names, "c", "i", "j", "h", "w"], (*lead, c, r, r, h, w))
    return combine(call, [source], [target], fixed=("h", "w"))


@rule("channel_shuffle")
def channel_shuffle(call: Call) -> Outcome:
    """``(N, (groups, c), *) -> (N, (c, groups), *)``."""
    groups, (n, channels, *rest) = call["groups"], call.shape(call.main)
    split = (groups, quotient(channels, groups) or 0)
    names = [*range(len(rest))]
    source = Term(call.main, ["n", "g", "c", *names], (n, *split, *rest))
    target = Term(None, ["n", "c", "g", *names], (n, *split[::-1], *rest))
    return combine(call, [source], [target], fixed=("g", "c"))


@rule("view_as_real", "view_as_complex", "view.dtype")
def reinterpret(call: Call) -> Outcome:
    """Elements read as others: the last dim of a changed shape holds parts of elements."""
    shape, target = call.shape(call.main), call.results[0]
    same = shape == target
    rank = min(len(shape), len(target)) - (len(shape) == len(target) and not same)
    outcome = combine(
        call,
        [Term(call.main, [*range(rank), *["in"] * (len(shape) - rank)])],
        [[*range(rank), *["out"] * (len(target) - rank)]],
    )
    return replace(outcome, as_is=True)
