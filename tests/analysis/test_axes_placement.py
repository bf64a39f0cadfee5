"""Placements: views in closed form, random chains of views, dynamic sizes, slices."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from axis_graphs import capture, inputs, result, trace
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.analysis.axes import (
    Leg,
    Placement,
    bind_sizes,
    index_map,
    slice_along,
    trace_axis,
)
from graphopt.errors import GraphoptError

MARK = 100  # added to every position that carries the axis, so that padding is told apart
x = torch.randn(2, 6, 4)


@pytest.mark.parametrize(
    ("view", "place"),
    [
        (lambda t: t.flatten(0, 1) * 1, Placement((Leg(0, 6, 1, outer=2),))),
        (lambda t: t.flatten(1, 2) * 1, Placement((Leg(1, 6, 1, inner=4),))),
        (lambda t: t.reshape(12, 2, 2) * 1, Placement((Leg(0, 6, 1, outer=2),))),
        (lambda t: t.flatten() * 1, Placement((Leg(0, 6, 1, outer=2, inner=4),))),
        (lambda t: t.view(2, 3, 2, 4) * 1, Placement((Leg(1, 3, 2), Leg(2, 2, 1)))),
        (lambda t: t.view(2, 3, 8) * 1, Placement((Leg(1, 3, 2), Leg(2, 2, 1, inner=4)))),
        (lambda t: t.flatten().view(2, 6, 4) * 1, Placement((Leg(1, 6),))),
        (lambda t: t.mT[:, None] * 1, Placement((Leg(3, 6),))),
        (lambda t: t[:, 2:] * 1, Placement((Leg(1, 4),), start=2)),
        (lambda t: t[:, 1::2] * 1, Placement((Leg(1, 3, 2),), start=1)),
        (lambda t: t[:, -1] * 1, Placement((), start=5)),
        (lambda t: t[:, 3:4] * 1, Placement((), start=3)),
        (lambda t: t.flip(1) * 1, Placement((Leg(1, 6, -1),), start=5)),
        (lambda t: F.pad(t, (0, 0, 2, 1)) * 1, Placement((Leg(1, 9),), start=-2)),
        (lambda t: torch.cat([torch.ones(2, 1, 4), t], 1) * 1, Placement((Leg(1, 7),), start=-1)),
        (lambda t: torch.cat([t, t], 1) * 1, Placement((Leg(1, 6, outer=2),))),
        (lambda t: torch.cat([t[:, :2], t[:, 2:]], 1) * 1, Placement((Leg(1, 6),))),
        (lambda t: torch.stack(t.unbind(1), 1) * 1, Placement((Leg(1, 6),))),
        (lambda t: t.repeat_interleave(3, 1) * 1, Placement((Leg(1, 6, inner=3),))),
        (lambda t: t[:, :, None].expand(2, 6, 5, 4) * 1, Placement((Leg(1, 6),))),
        (lambda t: t.view(2, 3, 2, 4).transpose(1, 2).flatten(1, 2) * 1,
         Placement((Leg(1, 2, 1, inner=3), Leg(1, 3, 2, outer=2)))),
    ],
)  # fmt: skip
def test_views_move_the_axis(view: Callable[[Tensor], Tensor], place: Placement) -> None:
    flow, out = trace(view, x)
    assert flow.placement(out) == place
    assert not flow.mixes and not flow.unknown
    assert_holds(place, view(marked((2, 6, 4), 1)))


def test_dynamic_sizes_fold_and_unfold() -> None:
    def fold(t: Tensor) -> tuple[Tensor, Tensor]:
        flat = t.flatten(0, 1).relu()
        return flat, flat.view(t.shape)[:, :-1].flatten(1) * 1

    graph = capture(fold, x, dynamic=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
    t = inputs(graph)[0]
    flow = trace_axis(t, 1)
    assert not flow.unknown and not flow.mixes
    real = torch.randn(3, 7, 4)
    sizes = bind_sizes(t.meta["val"], real)
    flat, cut = (flow.placement(result(graph, k)).at(sizes) for k in (0, 1))
    assert flat == Placement((Leg(0, 7, outer=3),))
    assert cut == Placement((Leg(1, 6, inner=4),))
    assert torch.equal(slice_along(real.flatten(0, 1), flat, 2), real[:, 2])


def marked(shape: tuple[int, ...], dim: int) -> Tensor:
    """A tensor whose values are the indices of one dim, plus `MARK`."""
    sizes = [-1 if k == dim else 1 for k in range(len(shape))]
    return (torch.arange(shape[dim]) + MARK).view(sizes).expand(shape).double()


def assert_holds(place: Placement, moved: Tensor) -> None:
    """A placement names the index of every position that a marked tensor was moved to."""
    taken = index_map(place, moved.dim()).expand(moved.shape)
    assert torch.equal(torch.where(moved >= MARK, moved - MARK, taken).long(), taken)


def _factorised(numel: int, rng: random.Random) -> list[int]:
    dims = []
    while numel > 1 and len(dims) < 4:
        divisors = [d for d in range(2, numel + 1) if numel % d == 0]
        dims.append(rng.choice(divisors) if len(dims) < 3 else numel)
        numel //= dims[-1]
    rng.shuffle(dims)
    return dims + [numel] * (numel > 1)


def _step(t: Tensor, rng: random.Random, *, fold: bool) -> Tensor:
    """One random view of a tensor."""
    dim = rng.randrange(t.dim()) if t.dim() else 0
    move = rng.choice(["reshape"] * 3 * fold + ["permute", "slice", "flip", "pad", "cat", "select"])
    if move == "reshape":
        return t.reshape(_factorised(t.numel(), rng))
    if move == "permute":
        return t.permute(rng.sample(range(t.dim()), t.dim()))
    if t.dim() == 0 or t.shape[dim] < 3:
        return t.unsqueeze(rng.randrange(t.dim() + 1))
    if move == "slice":
        begin = rng.randrange(t.shape[dim] - 1)
        return t[(slice(None),) * dim + (slice(begin, None, rng.choice([1, 1, 2])),)]
    if move == "flip":
        return t.flip(dim)
    if move == "pad":
        widths = [0, 0] * (t.dim() - 1 - dim) + [rng.randrange(2), rng.randrange(3)]
        return F.pad(t, widths)
    if move == "cat":
        return torch.cat([t.new_zeros(t.shape), t], dim)
    return t.select(dim, rng.randrange(t.shape[dim]))


def _chain(seed: int, length: int, *, fold: bool) -> Callable[[Tensor], Tensor]:
    def chain(t: Tensor) -> Tensor:
        rng = random.Random(seed)
        for _ in range(length):
            t = _step(t, rng, fold=fold)
        return t * 1

    return chain


def _placed(fn: Callable[[Tensor], Tensor], shape: tuple[int, ...], dim: int) -> Placement | None:
    graph = make_fx(fn, tracing_mode="fake")(torch.zeros(shape)).graph
    flow = trace_axis(inputs(graph)[0], dim)
    assert not flow.mixes
    out = graph.output_node().args[0]
    if not flow.depends(out):
        pytest.fail("a view lost the axis")
    return flow.placement(out)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.sampled_from([2, 3, 4, 6]), min_size=2, max_size=4).map(tuple),
    pick=st.integers(0, 3),
    seed=st.integers(0, 10**6),
    length=st.integers(1, 5),
)
def test_random_chains_of_views(shape: tuple[int, ...], pick: int, seed: int, length: int) -> None:
    dim, fn = pick % len(shape), _chain(seed, length, fold=True)
    place = _placed(fn, shape, dim)
    if place is not None:
        assert_holds(place, fn(marked(shape, dim)))


def test_chains_without_folding_are_never_unknown() -> None:
    for seed in range(60):
        fn = _chain(seed, 4, fold=False)
        place = _placed(fn, (3, 4, 5), seed % 3)
        assert place is not None
        assert_holds(place, fn(marked((3, 4, 5), seed % 3)))


def test_most_chains_with_folding_are_known() -> None:
    places = [_placed(_chain(seed, 3, fold=True), (4, 6, 4), seed % 3) for seed in range(60)]
    assert sum(place is not None for place in places) > 30  # the others cut through digits


@pytest.mark.parametrize("seed", range(12))
def test_symbolic_sizes_fold_and_unfold(seed: int) -> None:
    def fn(t: Tensor) -> Tensor:
        rng = random.Random(seed)
        for _ in range(4):
            k, shape = rng.randrange(t.dim() - 1), t.shape
            t = t.flatten(k, k + 1)
            if rng.random() < 0.6:
                t = t.view(shape)
            if t.dim() < 3:
                t = t.unflatten(-1, (-1, 2))
            t = t.transpose(0, 1)
        return t * 1

    graph = make_fx(fn, tracing_mode="symbolic")(torch.zeros(3, 5, 4)).graph
    t, out = inputs(graph)[0], graph.output_node().args[0]
    sizes = bind_sizes(t.meta["val"], torch.zeros(7, 9, 4))
    for dim in (0, 1):
        flow = trace_axis(t, dim)
        if (place := flow.placement(out)) is not None:
            assert_holds(place.at(sizes), fn(marked((7, 9, 4), dim)))
        assert place is not None or flow.unknown


def test_slice_along_takes_indices_out_of_a_fold() -> None:
    t = torch.arange(24).view(2, 3, 4)
    place = Placement((Leg(1, 3, inner=4),))
    assert torch.equal(slice_along(t.flatten(1), place, 1), t[:, 1])
    assert torch.equal(slice_along(t.flatten(1), place, [2, 0]), t[:, [2, 0]].flatten(1))


def test_slice_along_takes_one_index_of_a_split_axis() -> None:
    t = torch.arange(24).view(2, 3, 4)
    place = Placement((Leg(1, 3, 4), Leg(2, 4)))
    assert torch.equal(slice_along(t, place, 6), t[:, 1:2, 2:3])
    crossed = Placement((Leg(1, 4, 1, inner=3), Leg(1, 3, 4, outer=4)))
    assert torch.equal(slice_along(t.mT.flatten(1), crossed, 6), t[:, 1:2, 2])


def test_slice_along_of_a_pinned_tensor_is_all_of_it() -> None:
    t = torch.randn(3)
    assert slice_along(t, Placement((), start=2), 2) is t


@pytest.mark.parametrize(
    ("place", "index", "words"),
    [
        (Placement((Leg(0, 3),), start=1), 0, "index 0 .* 0 places"),
        (Placement((), start=2), 1, "index 1 .* 0 places"),
        (Placement((Leg(0, 3, 4), Leg(1, 4))), [1, 2], "2 parts"),
    ],
)
def test_slice_along_refuses(place: Placement, index: int | list[int], words: str) -> None:
    with pytest.raises(GraphoptError, match=words):
        slice_along(torch.zeros(3, 4), place, index)


def test_slice_along_needs_numbers() -> None:
    graph = capture(lambda t: t * 1, x, dynamic=({1: Dim.DYNAMIC},))
    place = trace_axis(inputs(graph)[0], 1).placement(result(graph))
    with pytest.raises(GraphoptError, match="symbolic size"):
        slice_along(x, place, 0)


def test_a_placement_reads_as_its_formula() -> None:
    assert str(Placement((Leg(0, 6, 1, outer=2, inner=4),), start=-1)) == "-1 + p0//4%6"
    assert str(Placement((Leg(1, 3, 2), Leg(2, 2)))) == "2*(p1) + p2"
    assert str(Placement((), start=5)) == "5"
