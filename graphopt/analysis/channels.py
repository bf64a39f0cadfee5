"""Where a factor per channel goes: from what computes a value to the products that read it.

If channel c of a value is divided by a factor ``t[c] > 0``, and every product that the factor
reaches multiplies its weight by it, a program computes what it computed. Whether that is so is
decided here by following *labels*: every element of a value carries the number of the channel whose
factor it has been given, or -1 for none. Views, slices and copies are applied to the labels
themselves, so that heads, groups of heads and parts of merged projections need no rules of their
own; products with other values and functions like ``relu`` keep labels; attention and matrix
products pass on those of the values that they sum up. Where an operator passes no factor on, the
channels whose labels arrive there are *pinned*: their factor must be 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from graphopt.analysis.flow import dependents
from graphopt.program import Program, operator_name, val
from graphopt.room import extent

aten = torch.ops.aten
NONE = -1

Labels: TypeAlias = Tensor
"""int64, of the value's shape as it was captured."""


@dataclass
class Channels:
    """The channels along the last axis of what ``producer`` computes.

    Attributes:
        free: bool ``(C,)``: channels whose factor may be anything positive.
        readers: products that take factors up, and the channel of each of their inputs, ``(K,)``.
        path: nodes between, in graph order; their values change.
        pins: nodes that pass factors no further -> why.
        blocks: channels that lay side by side where values were summed up, as in a head of
            attention, ``(D,)`` each.
    """

    producer: fx.Node
    free: Tensor
    readers: dict[fx.Node, Labels] = field(default_factory=dict)
    path: list[fx.Node] = field(default_factory=list)
    pins: dict[fx.Node, str] = field(default_factory=dict)
    blocks: list[Labels] = field(default_factory=list)


def follow(program: Program, producer: fx.Node, *, linear: bool = False) -> Channels:
    """Follow the factors of what a node computes through the program.

    Args:
        linear: only through what passes on any linear map of channels that lie side by side, such
            as a rotation of those of ``blocks``.
    """
    return _Walk(program, producer, _LINEAR if linear else _RULES).run()


def source(node: fx.Node) -> fx.Node:
    """Where factors for the channels of a value would have to come from: the first node on the way
    back that does not pass factors on."""
    while node.target in _RULES and node.all_input_nodes:
        node = next((n for n in node.all_input_nodes if n.op == "call_function"), node.args[0])  # type: ignore[assignment]
    return node


class _Walk:
    def __init__(self, program: Program, producer: fx.Node, rules: Mapping[Any, Step]) -> None:
        self.program, self.rules = program, rules
        shape = shape_of(producer)
        count = shape[-1]
        self.found = Channels(producer, torch.ones(count, dtype=torch.bool))
        self.labels: dict[fx.Node, Any] = {producer: torch.arange(count).expand(shape)}

    def run(self) -> Channels:
        for node in dependents([self.found.producer]):
            if any(n in self.labels for n in node.all_input_nodes):
                self._visit(node)
        output = self.program.output_node()
        for node in output.all_input_nodes:
            if node in self.labels:
                self.pin(self.labels[node], node, "it is an output of the model")
        return self.found

    def _visit(self, node: fx.Node) -> None:
        if node.target in _SIZES or (node.target is aten.linear.default and self._reads(node)):
            return
        rule = self.rules.get(node.target)
        made = rule(self, node) if rule is not None else None
        if made is None:
            for value in (self.labels[n] for n in node.all_input_nodes if n in self.labels):
                reason = f"{operator_name(node.target)} passes no factor on"
                self.pin(value, node, reason)
            return
        self.labels[node] = made
        self.found.path.append(node)

    def _reads(self, node: fx.Node) -> bool:
        """Whether a product takes the factors up: one channel per input, and a weight to scale."""
        given, weight = self.labels.get(node.args[0]), node.args[1]
        if given is None or weight in self.labels or node.args[0] is weight:
            return False
        if not self.program.is_constant(weight):
            return False
        flat = given.reshape(-1, given.shape[-1])
        self.pin(flat[:, (flat != flat[:1]).any(0)], node, "an input has factors of several")
        self.found.readers[node] = flat[0]
        return True

    def pin(self, labels: Any, node: fx.Node, reason: str) -> None:
        """The channels of these labels must keep a factor of 1."""
        for part in labels if isinstance(labels, tuple) else (labels,):
            channels = part[part != NONE].unique()
            if len(channels):
                self.found.free[channels] = False
                self.found.pins.setdefault(node, reason)

    def of(self, node: Any) -> Labels | None:
        found = self.labels.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Tensor) else None


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Sizes as they were captured."""
    return tuple(extent(n) for n in val(node).shape)


Step = Callable[[_Walk, fx.Node], Any]


def _rearranged(walk: _Walk, node: fx.Node) -> Any:
    """What the operator does to values it does to labels; values without get none."""

    def operand(value: fx.Node) -> Any:
        if value in walk.labels:
            return walk.labels[value]
        fake = val(value)
        if isinstance(fake, Tensor):
            return torch.full(shape_of(value), NONE)
        return extent(fake)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
    found = node.target(*args, **kwargs)  # type: ignore[operator]
    return tuple(found) if isinstance(found, list) else found


def _item(walk: _Walk, node: fx.Node) -> Any:
    found = walk.labels[node.args[0]]  # type: ignore[index]
    return found[node.args[1]] if isinstance(found, tuple) else None


def _kept(walk: _Walk, node: fx.Node) -> Any:
    found = walk.of(node.args[0])
    shown = found is not None and not any(n in walk.labels for n in node.all_input_nodes[1:])
    return found if shown else None


def _scaled(walk: _Walk, node: fx.Node) -> Any:
    """One operand times another that carries no factors."""
    left, right = (walk.of(a) for a in node.args[:2])
    if left is not None and right is not None:
        return None
    found = left if left is not None else right
    return None if found is None else found.expand(shape_of(node))


def _divided(walk: _Walk, node: fx.Node) -> Any:
    return _scaled(walk, node) if walk.of(node.args[1]) is None else None


def _scaled_evenly(walk: _Walk, node: fx.Node) -> Any:
    """A value times or divided by a number."""
    value, number = node.args[:2]
    return walk.of(value) if isinstance(number, int | float) else None


def _added(walk: _Walk, node: fx.Node) -> Any:
    """A sum of values with the same factors; where they differ, they must be 1."""
    left, right = (walk.of(a) for a in node.args[:2])
    if left is None or right is None:
        return None
    left, right = torch.broadcast_tensors(left, right)
    apart = left != right
    walk.pin(torch.cat([left[apart], right[apart]]), node, "it adds values of several channels")
    return torch.where(apart, NONE, left)


def _summed(walk: _Walk, node: fx.Node, values: Labels) -> Labels:
    """Rows ``(..., S, D)`` that are summed up along S, as many as the node has."""
    apart = values != values[..., :1, :]
    walk.pin(values[apart.any(-2, keepdim=True).expand_as(values)], node, "it sums channels up")
    first = torch.where(apart.any(-2, keepdim=True), NONE, values[..., :1, :])
    walk.found.blocks += first.reshape(-1, first.shape[-1]).unique(dim=0)
    return first.expand(shape_of(node))


def _multiplied(walk: _Walk, node: fx.Node) -> Any:
    """``weights @ values``: the columns of values keep their factors."""
    left, right = (walk.of(a) for a in node.args[:2])
    if left is not None or right is None or right.dim() < 2 or len(shape_of(node)) < 2:
        return None
    return _summed(walk, node, right)


def _attended(walk: _Walk, node: fx.Node) -> Any:
    values = walk.of(node.args[2])
    for other in node.all_input_nodes:
        if other in walk.labels and (other is not node.args[2] or other in node.args[:2]):
            walk.pin(walk.labels[other], node, "weights of attention depend on it")
    if values is None:
        return None
    shape = shape_of(node)
    heads = shape[-3] // values.shape[-3] if values.dim() > 2 else 1
    return _summed(walk, node, values.repeat_interleave(heads, -3) if heads > 1 else values)


def _names(*spelled: str) -> Iterator[Any]:
    for name in spelled:
        base, _, overload = name.partition(".")
        found = getattr(getattr(aten, base, None), overload or "default", None)
        if found is not None:
            yield found


_SIZES = frozenset(_names("sym_size.int", "sym_numel", "_assert_tensor_metadata"))
"""What they read of a value no factor changes."""

_RULES: dict[Any, Step] = {
    **dict.fromkeys(
        _names(
            *("view", "reshape", "_unsafe_view", "permute", "transpose.int", "t", "expand"),
            *("slice.Tensor", "select.int", "unsqueeze", "squeeze.dim", "squeeze.dims", "alias"),
            *("flatten.using_ints", "unflatten.int", "split.Tensor", "split_with_sizes", "chunk"),
            *("unbind.int", "cat", "stack", "narrow", "repeat", "repeat_interleave.self_int"),
            *("movedim.int", "flip", "detach", "swapaxes", "index_select"),
        ),
        _rearranged,
    ),
    **dict.fromkeys(
        _names(
            *("neg", "relu", "leaky_relu", "abs", "_to_copy", "clone", "contiguous"),
            *("mul.Scalar", "div.Scalar", "to.dtype", "lift_fresh_copy"),
        ),
        _kept,
    ),
    **dict.fromkeys(_names("mul.Tensor"), _scaled),
    **dict.fromkeys(_names("div.Tensor"), _divided),
    **dict.fromkeys(_names("add.Tensor", "sub.Tensor"), _added),
    **dict.fromkeys(_names("matmul", "bmm", "mm"), _multiplied),
    aten.scaled_dot_product_attention.default: _attended,
    getitem: _item,
}

_UNEVEN = frozenset(_names("relu", "leaky_relu", "abs"))
_LINEAR = {
    **{target: step for target, step in _RULES.items() if target not in _UNEVEN},
    **dict.fromkeys(_names("mul.Tensor", "div.Tensor"), _scaled_evenly),
}
"""Those that do the same to every channel, and to its sums with others."""
