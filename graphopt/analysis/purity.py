"""Which nodes compute the same value whenever they are called with the same arguments."""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphopt.program import is_mutating, is_random, val

aten = torch.ops.aten

_NAMESPACES = frozenset({"aten", "prims", "graphopt"})
_UNDEFINED = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_permuted.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
"""Operators whose result holds whatever the memory held."""


def is_pure(node: fx.Node) -> bool:
    """Whether a call depends on its arguments alone, does nothing else, and is known to.

    Operators of other libraries may read state that the program does not show: they are not.
    """
    if node.op != "call_function" or node.is_impure() or is_random(node):
        return False
    if is_mutating(node.target):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.namespace in _NAMESPACES and node.target not in _UNDEFINED
    return node.target is operator.getitem or is_size(val(node))


def is_size(value: object) -> bool:
    """Whether a fake value is a number that the shapes of the inputs decide."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)
