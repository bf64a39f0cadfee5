"""Named tuples of torch in a return value: plain tuples in the archive, their names beside it.

``torch.topk``, ``sort`` and ``linalg.svd`` return such tuples, and torch's archive has no word for
them. Whoever loads it without the names gets plain tuples.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.errors import LoadError

_TYPES: dict[str, Any] = {
    kind.__name__: kind
    for kind in vars(torch.return_types).values()
    if inspect.isclass(kind) and issubclass(kind, tuple)
}


def without_names(spec: pytree.TreeSpec) -> tuple[pytree.TreeSpec, dict[str, str]]:
    """The structure with plain tuples, and the names by place: ``"1.0"`` is child 0 of child 1."""
    names: dict[str, str] = {}

    def plain(node: pytree.TreeSpec, place: str) -> pytree.TreeSpec:
        if node.is_leaf():
            return node
        children = [plain(c, _below(place, i)) for i, c in enumerate(node.children())]
        name = getattr(node.type, "__name__", "")
        if _TYPES.get(name) is not node.type:
            return pytree.TreeSpec(node.type, node.context, children)
        names[place] = name
        return pytree.TreeSpec(tuple, None, children)

    return plain(spec, ""), names


def with_names(spec: pytree.TreeSpec, names: Mapping[str, str], where: str) -> pytree.TreeSpec:
    """The inverse of `without_names`.

    Raises:
        LoadError: a name is no type of torch, or its place is not a plain tuple of its length.
    """
    left = dict(names)

    def named(node: pytree.TreeSpec, place: str) -> pytree.TreeSpec:
        if node.is_leaf():
            return node
        children = [named(c, _below(place, i)) for i, c in enumerate(node.children())]
        if place not in left:
            return pytree.TreeSpec(node.type, node.context, children)
        kind = _TYPES.get(name := left.pop(place))
        if kind is None or node.type is not tuple or kind.n_sequence_fields != len(children):
            raise LoadError(f"{name!r:.80} is no type of this return value", where=where)
        return pytree.TreeSpec(kind, None, children)

    found = named(spec, "")
    if left:
        raise LoadError(f"the return value has no place {next(iter(left))!r:.80}", where=where)
    return found


def _below(place: str, index: int) -> str:
    return f"{place}.{index}" if place else str(index)
