"""Weights that were folded into others: a later write to one would go unseen."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.program import Program

Watched = tuple[str, "weakref.ref[Tensor]", int]


class FoldedWeights:
    """The original's tensors that the rewritten program holds in another form.

    They are not kept alive. Calling the object raises once one was written in place, as optimizers
    and ``load_state_dict`` do; writes through ``.data`` cannot be seen.
    """

    def __init__(self, original: Program | None = None, optimized: Program | None = None) -> None:
        self.watched: list[Watched] = []
        if original is not None and optimized is not None:
            tensors = _folded(original, optimized)
            self.watched = [(name, weakref.ref(t), t._version) for name, t in tensors]

    def __call__(self) -> None:
        """Raises `GraphoptError` where a folded tensor was written since."""
        if torch.compiler.is_compiling():
            return
        for name, reference, version in self.watched:
            tensor = reference()
            if tensor is not None and tensor._version != version:
                raise GraphoptError(
                    f"{name} was written in place after it was folded: the optimized module still "
                    "computes with its old value",
                    fix="compile the model again; a model in training mode is never folded",
                )

    def __getstate__(self) -> dict[str, list[Watched]]:
        """A copy of the module no longer depends on the original."""
        return {"watched": []}


def _folded(original: Program, optimized: Program) -> Iterator[tuple[str, Tensor]]:
    """Constants with fewer readers than they had, where new tensors stand for them."""
    if optimized.state.keys() <= original.state.keys():
        return
    before, after = _readers(original), _readers(optimized)
    for node, name in original.state_nodes().items():
        tensor = original.state[name]
        if original.is_constant(node) and after[id(tensor)] < before[id(tensor)]:
            yield name, tensor


def _readers(program: Program) -> Counter[int]:
    found: Counter[int] = Counter()
    for node, name in program.state_nodes().items():
        found[id(program.state[name])] += len(node.users)
    return found
