"""One operator, one axis, one index perturbed: what may change, and what has to.

`check` holds a rule to its word. *Sound*: where it gives a placement, changing index ``i`` of the
axis changes positions of index ``i`` only. *Tight*: where it says that the operator mixes, no dim
of the result would have kept the indices apart. *Sliceable*: where it says ``as_is``, the operator
run on slices gives the slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map

from graphopt.analysis.axes import (
    AxisFlow,
    Carry,
    Mix,
    Parallel,
    Placement,
    Unknown,
    index_map,
    slice_along,
    trace_axis,
)

TRIALS = 4
placed = lru_cache(index_map)


@dataclass(frozen=True)
class Draw:
    """A tensor argument: how to draw one."""

    make: Callable[[], Tensor]


def f(*shape: int) -> Draw:
    return Draw(lambda: torch.randn(shape) * 2)


def pos(*shape: int) -> Draw:
    """Values between 0.1 and 0.9."""
    return Draw(lambda: torch.rand(shape) * 0.8 + 0.1)


def i(high: int, *shape: int) -> Draw:
    return Draw(lambda: torch.randint(0, high, shape))


def i8(*shape: int) -> Draw:
    return Draw(lambda: torch.randint(-9, 9, shape, dtype=torch.int8))


def b(*shape: int) -> Draw:
    return Draw(lambda: torch.rand(shape) > 0.5)


def rare(*shape: int) -> Draw:
    """Bools, mostly false."""
    return Draw(lambda: torch.rand(shape) < 0.1)


def often(*shape: int) -> Draw:
    """Bools, mostly true."""
    return Draw(lambda: torch.rand(shape) > 0.1)


def c(*shape: int) -> Draw:
    return Draw(lambda: torch.randn(shape, dtype=torch.complex64))


@dataclass(frozen=True)
class Sample:
    """A call of an operator.

    ``careful``: (tensor, dim) pairs along which the rule says less than it could.
    ``garbage``: the values of the result mean nothing (``empty_like``).
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    careful: frozenset[tuple[int, int]] = frozenset()
    garbage: bool = False

    def __str__(self) -> str:
        return self.name


def s(name: str, *args: Any, careful: Any = (), garbage: bool = False, **kwargs: Any) -> Sample:
    return Sample(name, args, kwargs, frozenset(careful), garbage)


def operator_of(name: str) -> Any:
    space, _, rest = name.rpartition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, space or "aten"), packet), overload or "default")


class Bench:
    """An operator in a graph of its own, and runs of it on drawn tensors."""

    def __init__(self, sample: Sample) -> None:
        self.op, self.garbage = operator_of(sample.name), sample.garbage
        self.draws: list[Draw] = []
        self.inputs: list[Node] = []
        graph = Graph()

        def to_node(value: Any) -> Any:
            if not isinstance(value, Draw):
                return value
            self.draws.append(value)
            self.inputs.append(graph.placeholder(f"x{len(self.inputs)}"))
            return self.inputs[-1]

        args, kwargs = tree_map(to_node, (sample.args, sample.kwargs))
        self.node = graph.call_function(self.op, args, kwargs)
        graph.output(self.node)
        self.values = [draw.make() for draw in self.draws]
        for node, value in zip(self.inputs, self.values, strict=True):
            node.meta["val"] = value
        self.result = self.run(self.values)
        self.node.meta["val"] = self.result if _single(self.result) else tuple(self.result)

    def run(self, values: list[Tensor]) -> Any:
        given = dict(zip(self.inputs, values, strict=True))
        args, kwargs = torch.fx.map_arg((self.node.args, self.node.kwargs), given.__getitem__)
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(0)  # torch.manual_seed formats a stack per device kind
        result = self.op(*args, **kwargs)
        torch.set_rng_state(state)
        if self.garbage:
            result.zero_()
        return result.clone() if isinstance(result, Tensor) else result

    def outputs(self, result: Any) -> list[Any]:
        return [result] if _single(result) else list(result)


def _single(result: Any) -> bool:
    return not isinstance(result, (tuple, list))


def check(sample: Sample) -> None:
    """Every axis of every tensor of a sample, and every pair of dims as one axis."""
    bench = Bench(sample)
    for k, value in enumerate(bench.values):
        dims = [dim for dim, size in enumerate(value.shape) if size > 1]
        for dim in dims:
            flow = trace_axis(bench.inputs[k], dim)
            verdict = flow.verdicts.get(bench.node)
            sound(bench, flow, k)
            if isinstance(verdict, (Mix, Unknown)) and (k, dim) not in sample.careful:
                assert tight(bench, flow, k), f"tensor {k} dim {dim}: {verdict} is too much"
            if isinstance(verdict, Parallel) and verdict.as_is and not verdict.random:
                sliceable(bench, flow, k)
        for pair in combinations(dims, 2):
            sound(bench, trace_axis(bench.inputs[k], pair), k)


def sound(bench: Bench, flow: AxisFlow, k: int) -> None:
    """Where the rule gives a placement, a new index ``i`` changes positions of index ``i`` only.

    Operands that the rule calls aligned are perturbed with the one that carries the axis.
    """
    states = flow.states.get(bench.node)
    states = states if isinstance(states, tuple) else (states,) * len(bench.outputs(bench.result))
    aligned = [a for a in flow.aligned.get(bench.node, ()) if not a.partial]
    spots = [(k, flow.placement(bench.inputs[k]))]
    spots += [(bench.inputs.index(a.node), a.placement) for a in aligned]
    if bench.node in flow.stopped:
        return
    for index, changed in perturbations(bench, flow.extent, spots):
        for state, moved in zip(states, changed, strict=True):
            assert state is not None or not moved.any(), f"called free, but index {index} matters"
            if state is not None and state.pure:
                inside = placed(state.places[0], moved.dim()) == index
                assert not (moved & ~inside).any(), f"{state.places[0]}: index {index} leaks"


Spots = list[tuple[int, Placement]]


def perturbations(bench: Bench, extent: int, spots: Spots) -> Iterator[tuple[int, list[Tensor]]]:
    """For each index of an axis, which positions of each output a new value there changes."""
    before = bench.outputs(bench.result)
    for index in [*range(extent)] * TRIALS:
        after = bench.outputs(bench.run(perturbed(bench, spots, index)))
        yield index, [differs(a, b) for a, b in zip(before, after, strict=True)]


def perturbed(bench: Bench, spots: Spots, index: int) -> list[Tensor]:
    """The arguments with new values at one index of the axis."""
    values, fresh = [v.clone() for v in bench.values], [d.make() for d in bench.draws]
    for n, place in spots:
        mask = (placed(place, values[n].dim()) == index).expand(values[n].shape)
        values[n] = torch.where(mask, fresh[n], values[n])
    return values


def differs(a: Any, b: Any) -> Tensor:
    """Which positions differ; all of them where the shape does."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return torch.tensor(a != b)
    if a.shape != b.shape:
        return torch.ones(a.shape, dtype=torch.bool)
    return ~((a == b) | (a.isnan() & b.isnan()))


def tight(bench: Bench, flow: AxisFlow, k: int) -> bool:
    """Whether the indices really meet: something changed, and along no dim at its own index."""
    place = flow.placement(bench.inputs[k])
    changes = list(perturbations(bench, flow.extent, [(k, place)]))
    outputs = range(len(bench.outputs(bench.result)))
    moved = any(changed[out].any() for _, changed in changes for out in outputs)
    return moved and not all(_apart(flow.extent, out, changes) for out in outputs)


def _apart(extent: int, out: int, changes: list[tuple[int, list[Tensor]]]) -> bool:
    """Whether some dim of an output keeps the indices apart, or the output never changed."""
    shape = changes[0][1][out].shape
    return not any(changed[out].any() for _, changed in changes) or any(
        shape[dim] == extent
        and all(
            not changed[out].index_select(dim, others(extent, index)).any()
            for index, changed in changes
        )
        for dim in range(len(shape))
    )


def others(extent: int, index: int) -> Tensor:
    return torch.tensor([k for k in range(extent) if k != index])


def sliceable(bench: Bench, flow: AxisFlow, k: int) -> None:
    """The operator on every second index gives every second index of its result."""
    states = flow.states[bench.node]
    states = states if isinstance(states, tuple) else (states,)
    chosen = list(range(0, flow.extent, 2))
    values = list(bench.values)
    spots = {bench.inputs[k]: flow.placement(bench.inputs[k])}
    spots |= {a.node: a.placement for a in flow.aligned.get(bench.node, ())}
    for node, place in spots.items():
        n = bench.inputs.index(node)
        values[n] = slice_along(values[n], place, chosen)
    got = bench.outputs(bench.run(values))
    for state, part, whole in zip(states, got, bench.outputs(bench.result), strict=True):
        if isinstance(state, Carry) and state.pure and len(state.places[0].legs) == 1:
            want = slice_along(whole, state.places[0], chosen)
            torch.testing.assert_close(part, want, equal_nan=True)
