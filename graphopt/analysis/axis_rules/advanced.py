"""Advanced indexing with tensors: ``x[a, :, b]`` and ``x[a] = v``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from graphopt.analysis.axis_rules.call import Call, Outcome, rule
from graphopt.analysis.axis_rules.iota import identity_dim
from graphopt.analysis.axis_rules.labels import Label, Term, combine
from graphopt.analysis.axis_rules.pointwise import trailing


@dataclass(frozen=True)
class _Index:
    """One index tensor: the first of the dims it stands for, how many, and the names of its own."""

    node: Node
    dim: int
    count: int
    names: Sequence[Label]
    identity: Label = None  # the name along which it counts 0, 1, 2, ... to the end of its dim

    @property
    def mask(self) -> bool:
        return self.names[0] == ("mask", self.dim) if self.names else False

    @property
    def dims(self) -> range:
        return range(self.dim, self.dim + self.count)


@rule("index.Tensor", "_unsafe_index.Tensor", "index.Tensor_hacked_twin",
      "_unsafe_index.Tensor_hacked_twin")  # fmt: skip
def index(call: Call) -> Outcome:
    """The indexed dims give way to those of the indices, broadcast against each other.

    An index that counts ``0, 1, 2, ...`` (``x[arange(B), last]``) reads its dim in order.
    """
    indices = _indices(call)
    names: list[Label] = [*range(call.rank(call.main))]
    for item in indices:
        for k, dim in enumerate(item.dims):
            names[dim] = item.names[k] if item.mask else item.identity or ("in", dim)
    terms = [Term(call.main, names), *(Term(item.node, item.names) for item in indices)]
    counted = [item.identity for item in indices if item.identity is not None]
    return combine(call, terms, [_taken(call, indices)], lost="reindex", fixed=counted)


@rule("index_put", "_unsafe_index_put", "index_put.hacked_twin", "_unsafe_index_put.hacked_twin")
def index_put(call: Call) -> Outcome:
    """``self`` stays where it is; values go where the indices say.

    Under a mask a value that is the same everywhere makes this a ``masked_fill``.
    """
    indices = _indices(call)
    taken, values = _taken(call, indices), call["values"]
    seen = taken[len(taken) - call.rank(values) :] if call.rank(values) else []
    shape = call.shape(values)
    constant = all(size == 1 for name, size in zip(seen, shape, strict=True) if _picked(name))
    renamed: dict[Label, Label] = {}
    for item in indices:
        if item.mask and constant:
            renamed |= {("mask", dim): dim for dim in item.dims}
        if item.identity is not None:
            renamed.setdefault(item.identity, item.dim)
    names = [*range(call.rank(call.main))]
    terms = [Term(call.main, names), Term(values, [renamed.get(n, n) for n in seen])]
    terms += [Term(item.node, [renamed.get(n, n) for n in item.names]) for item in indices]
    fixed = [d for item in indices if not (item.mask and constant) for d in item.dims]
    return combine(call, terms, [names], lost="reindex", fixed=fixed)


def _picked(name: Label) -> bool:
    return isinstance(name, tuple) and name[0] == "index"


def _indices(call: Call) -> list[_Index]:
    out: list[_Index] = []
    dim = 0
    for node in call["indices"]:
        if node is not None:
            out.append(_index(call, node, dim))
        dim += out[-1].count if node is not None else 1
    return out


def _index(call: Call, node: Node, dim: int) -> _Index:
    if _is_mask(node):
        count = call.rank(node)
        return _Index(node, dim, count, [("mask", dim + k) for k in range(count)])
    names = [("index", k) for k in trailing(call.rank(node))]
    position = identity_dim(call, node, call.shape(call.main)[dim])
    return _Index(node, dim, 1, names, None if position is None else names[position])


def _is_mask(node: Node) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


def _taken(call: Call, indices: list[_Index]) -> list[Label]:
    """Names of ``self[indices]``: the indices' dims where the indexed ones were if those are
    neighbours, else in front.
    """
    shared = max(1 if item.mask else len(item.names) for item in indices)
    picked = [("index", k) for k in trailing(shared)]
    gone = {dim for item in indices for dim in item.dims}
    given = [k for k, node in enumerate(call["indices"]) if node is not None]
    neighbours = given == [*range(given[0], given[-1] + 1)]
    first = indices[0].dim if neighbours else 0
    rest = [dim for dim in range(call.rank(call.main)) if dim not in gone]
    return [*(d for d in rest if d < first), *picked, *(d for d in rest if d >= first)]
