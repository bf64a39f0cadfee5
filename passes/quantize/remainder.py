"""What stands beside a quantized product: columns in floats, single numbers, a low-rank correction.

``linear(x, W, b) = quantized_linear(x, Q, b) + sum_i product(x, part_i)`` for ``W = Q + sum_i
part_i``. All of it is operators of torch: what runs, saves or exports these runs, saves and exports
the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from graphopt.kernels.quantized.remainder import Columns, LowRank, Numbers, Part, name
from graphopt.program import val
from graphopt.rewrite import Builder

aten = torch.ops.aten


class Held(NamedTuple):
    """State of a program: the parts, and zeros where the quantized product has no input."""

    parts: Sequence[tuple[type[Part], dict[str, fx.Node]]]
    mask: fx.Node | None = None

    def quantized(self, x: fx.Node, build: Builder) -> fx.Node:
        """The input of the quantized product."""
        made: fx.Node = x if self.mask is None else build(aten.mul.Tensor, x, self.mask)
        return made

    def add(self, product: fx.Node, x: fx.Node, build: Builder) -> fx.Node:
        """The product with all that stands beside it."""
        for kind, tensors in self.parts:
            product = build(aten.add.Tensor, product, _BUILD[kind](x, tensors, build))
        return product


def hold(parts: Sequence[Part], weight: fx.Node, build: Builder, *, apart: bool) -> Held:
    """State for the parts of a weight.

    Args:
        apart: activations are quantized row by row: inputs that are columns in floats have no part
            in that, so that large ones do not make all others coarse (Dettmers et al. 2022,
            "LLM.int8()", section 3.2).
    """
    base = build.program.target_of(weight) or weight.name
    held, mask = [], None
    for part in parts:
        tensors = part.tensors.items()
        made = {k: build.state(name(base, part, k), t, (weight,)) for k, t in tensors}
        held.append((type(part), made))
        if apart and isinstance(part, Columns):
            fake = val(weight)
            ones = torch.ones(fake.shape[1], dtype=fake.dtype, device=part.places.device)
            zeroed = ones.index_fill(0, part.places, 0.0)
            mask = build.state(name(base, part, "mask"), zeroed, (weight,))
    return Held(held, mask)


def _columns(x: fx.Node, held: dict[str, fx.Node], build: Builder) -> fx.Node:
    chosen = build(aten.index_select.default, x, -1, held["places"])
    return _linear(chosen, held["values"], build)


def _low_rank(x: fx.Node, held: dict[str, fx.Node], build: Builder) -> fx.Node:
    return _linear(_linear(x, held["right"], build), held["left"], build)


def _numbers(x: fx.Node, held: dict[str, fx.Node], build: Builder) -> fx.Node:
    """As many bags as output channels, of inputs that are the rows of an embedding."""
    sizes = [build.size(x, dim) for dim in range(val(x).dim() - 1)]
    rows = build(aten.t.default, build(aten.reshape.default, x, [-1, val(x).shape[-1]]))
    places = _cast(held["places"], torch.int32, build)
    values = _cast(held["values"], val(x).dtype, build)
    bags = build(
        aten.embedding_bag.padding_idx,
        rows,
        places,
        held["starts"],
        False,
        0,  # sums
        False,
        values,
        True,
        None,
    )
    made = build(aten.t.default, build.item(bags, 0))
    whole: fx.Node = build(aten.reshape.default, made, [*sizes, val(made).shape[-1]])
    return whole


_BUILD: dict[type[Part], Callable[[fx.Node, dict[str, fx.Node], Builder], fx.Node]] = {
    Columns: _columns,
    LowRank: _low_rank,
    Numbers: _numbers,
}


def _linear(x: fx.Node, weight: fx.Node, build: Builder) -> fx.Node:
    made: fx.Node = build(aten.linear.default, x, _cast(weight, val(x).dtype, build))
    return made


def _cast(node: fx.Node, dtype: torch.dtype, build: Builder) -> fx.Node:
    same = val(node).dtype == dtype
    return node if same else build(aten._to_copy.default, node, dtype=dtype)


def told(parts: Sequence[Part], super_weights: int) -> str:
    """What is beside a weight, and the bytes that it takes."""
    if not parts:
        return ""
    found = " and ".join(map(str, parts))
    count = sum(part.nbytes for part in parts)
    supers = f", super weights among them: {super_weights}" if super_weights else ""
    return f"beside it {found}, {count} bytes{supers}"


def product(parts: Sequence[Part], x: Tensor) -> Tensor | float:
    """What the parts add to a product of ``x``."""
    return sum(part.product(x) for part in parts)
