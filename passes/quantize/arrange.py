"""Operands of a product laid out as matrices, and its result laid back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.passes.quantize.contraction import Axes, Contraction, Labels
from graphopt.program import val
from graphopt.rewrite import Builder
from graphopt.rewrite.stride import same_layout

aten = torch.ops.aten


def without_repeats(read: Contraction, side: int, value: Tensor) -> Contraction:
    """The contraction with a weight of its own numbers: axes along which it repeats are rows."""
    given = [*read.labels]
    given[side] = tuple(
        None
        if label in read.labels[1 - side] and label in read.out and _repeats(value, i)
        else label
        for i, label in enumerate(read.labels[side])
    )
    return replace(read, labels=(given[0], given[1]))


def _repeats(value: Tensor, dim: int) -> bool:
    return value.shape[dim] == 1 or value.stride(dim) == 0


def matrix_of(value: Tensor, labels: Labels, axes: Axes) -> Tensor:
    """A view of a weight with axes in the order ``(batch, columns, inner)``."""
    for dim in reversed([i for i, label in enumerate(labels) if label is None]):
        value = value.select(dim, 0)
    named: list[Any] = [label for label in labels if label is not None]
    return value.permute([named.index(a) for a in (*axes.batch, *axes.columns, *axes.inner)])


def arranged(build: Builder, read: Contraction, side: int, axes: Axes, width: int) -> fx.Node:
    """The other operand as ``(batch..., rows..., width)``."""
    x, labels = read.operands[1 - side], read.labels[1 - side]
    for dim in reversed([i for i, label in enumerate(labels) if label is None]):
        x = build(aten.select.int, x, dim, 0)
    named = [label for label in labels if label is not None]
    lead = (*axes.batch, *axes.rows)
    x = _permuted(build, x, named, (*lead, *axes.inner))
    if len(axes.inner) == 1:
        return x
    sizes = [build.size(x, dim) for dim in range(len(lead))]
    made: fx.Node = build(aten.reshape.default, x, [*sizes, width])
    return made


def restored(build: Builder, made: fx.Node, read: Contraction, axes: Axes) -> fx.Node:
    """``(batch..., rows..., columns)`` with the axes of the result, and its summand added."""
    lead = (*axes.batch, *axes.rows)
    if len(axes.columns) != 1:
        sizes = [build.size(made, dim) for dim in range(len(lead))]
        found = val(read.node).shape
        columns = [found[read.out.index(a)] for a in axes.columns]
        made = build(aten.reshape.default, made, [*sizes, *columns])
    made = _permuted(build, made, [*lead, *axes.columns], read.out)
    if read.summand is not None:
        made = build(aten.add.Tensor, made, read.summand)
    if not same_layout(val(read.node), val(made)) and val(read.node).is_contiguous():
        made = build(aten.clone.default, made, memory_format=torch.contiguous_format)
    return made


def _permuted(build: Builder, x: fx.Node, labels: list[Any], wanted: Labels) -> fx.Node:
    order = [labels.index(a) for a in wanted]
    if order == sorted(order):
        return x
    made: fx.Node = build(aten.permute.default, x, order)
    return made


def as_bias(read: Contraction, axes: Axes) -> fx.Node | None:
    """A summand that is a vector along the columns, the last axis of the result."""
    last = axes.columns[-1:] == read.out[-1:] and len(axes.columns) == 1
    summand = read.summand
    if summand is None or not last or val(summand).dim() != 1:
        return None
    width = val(read.node).shape[-1]
    return summand if val(summand).shape[0] == width else None
