"""Where a rotation of features goes: all values that are rotated if one of them is.

Sums, views along other axes, numbers that scale whole rows and RMS norms without weights turn
rotated values into rotated ones. What else writes such values or reads them is an *end*: a layer
whose weight the rotation can be folded into, or one that needs a product with the rotation itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.passes.residual_stream import source_axes
from graphopt.program import Program, operator_name, val
from graphopt.rewrite import Builder, arguments
from graphopt.rewrite.builder import is_folded

aten = torch.ops.aten

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
NORMS = (aten.rms_norm.default, aten.layer_norm.default)
_SCALED = (aten.mul.Scalar, aten.div.Scalar, aten.neg.default, aten._to_copy.default)
_FACTORIES = frozenset(
    getattr(aten, name).default
    for name in (
        *("new_ones", "new_zeros", "new_full", "new_empty", "_assert_tensor_metadata"),
        *("ones_like", "zeros_like", "full_like", "empty_like"),
    )
)

Sources = list[tuple[fx.Node, int]]
Axes = frozenset[int]
"""Axes of a weight that a rotation is folded into."""


@dataclass
class Space:
    """Values whose features are rotated together.

    Attributes:
        width: how many features.
        values: what holds them -> the axis on which they lie.
        inner: those of ``values`` that are computed from others of them; the rest are written.
        readers: products that read them along their inputs.
        leaves: values -> what else reads them.
        folds: ends whose weight takes the rotation up -> the axes on which it does.
        twisted: a value that lies on two axes.
    """

    width: int
    values: dict[fx.Node, int] = field(default_factory=dict)
    inner: dict[fx.Node, Sources] = field(default_factory=dict)
    readers: dict[fx.Node, fx.Node] = field(default_factory=dict)
    leaves: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    folds: dict[fx.Node, Axes] = field(default_factory=dict)
    twisted: fx.Node | None = None

    def entries(self) -> list[fx.Node]:
        """Written values that have to be multiplied by the rotation."""
        return [n for n in self.values if n not in self.inner and n not in self.folds]

    def exits(self) -> dict[fx.Node, fx.Node]:
        """Values that are needed as they were -> the first node that needs them so."""
        found = {v: n for n, v in self.readers.items() if n not in self.folds}
        found |= {value: users[0] for value, users in self.leaves.items()}
        entries = set(self.entries())
        return {v: n for v, n in found.items() if v not in entries}

    def normalised(self) -> list[fx.Node]:
        """Norms that read the values and do not pass a rotation on."""
        return [n for users in self.leaves.values() for n in users if n.target in NORMS]

    def is_read_by_products(self) -> bool:
        """Whether products read what norms make of the values."""
        users = [user for norm in self.normalised() for user in norm.users]
        return bool(self.readers) or any(u.target is aten.linear.default for u in users)


def find_spaces(program: Program) -> Iterator[Space]:
    """Every space that a norm over its features reads, in graph order."""
    seen: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.target not in NORMS or node.args[0] in seen:
            continue
        source = node.args[0]
        width = val(source).shape[-1]
        if len(arguments(node)["normalized_shape"]) == 1 and isinstance(width, int):
            space = _grow(source, width)
            _fold(program, space)
            seen.update(space.values)
            yield space


def _grow(source: fx.Node, width: int) -> Space:
    space = Space(width)
    queue = [(source, val(source).dim() - 1)]
    while queue:
        node, axis = queue.pop()
        if node in space.values:
            if space.values[node] != axis:
                space.twisted = space.twisted or node
            continue
        space.values[node] = axis
        if (parts := _parts(node, axis)) is not None:
            space.inner[node] = parts
            queue += parts
        queue += _users(node, axis, space)
    return space


def _users(node: fx.Node, axis: int, space: Space) -> Iterator[tuple[fx.Node, int]]:
    """Users of a value that hold the features too; the others are noted as its readers."""
    for user in node.users:
        if reads_sizes(user, node):
            continue
        if (at := _axis_in(user, node, axis)) is not None:
            yield user, at
        elif _is_product_of(user, node) and axis == val(node).dim() - 1:
            space.readers[user] = node
        else:
            space.leaves.setdefault(node, []).append(user)


def reads_sizes(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user of a value reads its sizes alone."""
    if isinstance(val(user), int | torch.SymInt):
        return True
    return user.target in _FACTORIES and user.all_input_nodes.count(node) == 1


def _is_product_of(user: fx.Node, node: fx.Node) -> bool:
    return user.target is aten.linear.default and user.args[0] is node and node not in user.args[1:]


def _axis_in(user: fx.Node, node: fx.Node, axis: int) -> int | None:
    """Where the features of a value lie in what is computed from it, if they stay together."""
    rank = val(user).dim() if isinstance(val(user), Tensor) else 0
    parts = ((at, _parts(user, at)) for at in range(rank))
    return next((at for at, found in parts if found and (node, axis) in found), None)


def _parts(node: fx.Node, axis: int) -> Sources | None:
    """The rotated values that a node computes a rotated one from; ``None`` for what does not."""
    if node.op != "call_function" or not val(node).is_floating_point():
        return None
    width = val(node).shape[axis]
    found = _carried(node, axis)
    found = source_axes(node, axis) if found is None else found
    whole = found and all(statically_known_true(val(n).shape[at] == width) for n, at in found)
    return found if whole else None


def _carried(node: fx.Node, axis: int) -> Sources | None:
    """Norms, casts and scales: their operand has the same axes."""
    given = arguments(node)
    if node.target is aten.rms_norm.default:
        last = axis == val(node).dim() - 1 and len(given["normalized_shape"]) == 1
        return [(given["input"], axis)] if last and given["weight"] is None else None
    if node.target in _SCALED:
        return [(node.args[0], axis)]  # type: ignore[list-item]
    if node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    value, scale = given["self"], given["other"]
    if node.target is aten.mul.Tensor and _scales_rows(value, axis - val(node).dim()):
        value, scale = scale, value
    back = axis - val(node).dim()
    fits = isinstance(value, fx.Node) and val(value).dim() >= -back
    return [(value, val(value).dim() + back)] if fits and _scales_rows(scale, back) else None


def _scales_rows(scale: Any, back: int) -> bool:
    """Whether a factor is one number for all features, whose axis is counted from the back."""
    fake = val(scale)
    if not isinstance(fake, Tensor):
        return not isinstance(scale, fx.Node)
    return fake.dim() < -back or statically_known_true(fake.shape[back] == 1)


def _fold(program: Program, space: Space) -> None:
    """Find the ends whose weights only ends of the space read, all on the same axes."""
    wanted = {n: axes for n in space.values if (axes := _written(n, space))}
    for node in space.readers:
        wanted[node] = wanted.get(node, frozenset()) | {1}
    for node, axes in wanted.items():
        tensors = held_by(node)
        alike = all(wanted.get(user) == axes for user in tensors[0].users)
        if node.op == "placeholder":
            alike = set(node.users) <= space.inner.keys()
        if alike and all(map(program.is_constant, tensors)):
            space.folds[node] = axes


def _written(node: fx.Node, space: Space) -> Axes:
    """Axes of a writer's own weight along which it writes features; none for other nodes."""
    axis = space.values[node]
    last = axis == val(node).dim() - 1
    if node in space.inner or not val(node).is_floating_point():
        return frozenset()
    if node.op == "placeholder":
        return frozenset({axis})
    if node.target is aten.linear.default and last:
        return frozenset({0})
    if node.target is aten.embedding.default and last:
        return frozenset({1})
    batched = node.target in CONVOLUTIONS and val(node).dim() == val(node.args[1]).dim()
    return frozenset({0}) if batched and axis == 1 else frozenset()


def held_by(node: fx.Node) -> list[fx.Node]:
    """The weight of an end, and its bias where it has one; a placeholder is its own."""
    if node.op == "placeholder":
        return [node]
    given = arguments(node)
    return [n for n in (given["weight"], given.get("bias")) if n is not None]


def folded(weight: fx.Node, value: Tensor, build: Builder, by: str = "rotate") -> fx.Node:
    """State that takes the place of a weight of the same shape, made of it by a method."""
    name = build.program.target_of(weight) or weight.name
    return build.state(name if is_folded(name) else f"{name}_folded", value, (weight,), by)


def told(node: fx.Node) -> str:
    """A node in words."""
    if node.op == "output":
        return "the output of the model"
    name = f" ({operator_name(node.target)})" if node.op == "call_function" else ""
    return f"`{node.name}`{name}"
