"""State whose values rewrites have used: a later write to it would go unseen."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.program import Program

Watched = tuple[str, "weakref.ref[Tensor]", tuple[int, int]]
"""A name, the tensor, and its version and address as they were."""

_STATISTICS = re.compile(r"running_(mean|var)$")


class FoldedWeights:
    """The original's tensors whose values rewrites have used: folded, or read as numbers or masks.

    They are not kept alive. Calling the object raises once one was written in place, as optimizers
    and ``load_state_dict`` do, or its ``.data`` replaced; writes into ``.data`` cannot be seen.
    """

    def __init__(self, original: Program | None = None, optimized: Program | None = None) -> None:
        self.watched: list[Watched] = []
        self.statistics: list[Statistics] = []
        if original is not None and optimized is not None:
            tensors = [(n, t) for n, t in original.state.items() if n in optimized.relied]
            self.watched = [(name, weakref.ref(t), mark(t)) for name, t in tensors]
            self.statistics = [Statistics(n, original.state) for n, _ in tensors if is_counted(n)]

    def __call__(self) -> None:
        """Raises `GraphoptError` where a folded tensor was written since."""
        if torch.compiler.is_compiling():
            return
        for name, reference, known in self.watched:
            tensor = reference()
            if tensor is not None and mark(tensor) != known:
                raise _changed(name)
        for statistics in self.statistics:
            if statistics.changed():
                raise _changed(statistics.name)

    def __getstate__(self) -> dict[str, list[Any]]:
        """A copy of the module no longer depends on the original."""
        return {"watched": [], "statistics": []}


class Statistics:
    """A running mean or variance: batch norms write it unseen, but count how often."""

    def __init__(self, name: str, state: Mapping[str, Tensor]) -> None:
        self.name = name
        self.tensor = weakref.ref(state[name])
        counter = state.get(_STATISTICS.sub("num_batches_tracked", name))
        self.counter = weakref.ref(counter) if counter is not None else None
        self.mark, self.values = self._counted(), state[name].detach().clone()

    def _counted(self) -> tuple[int, int] | None:
        counter = self.counter() if self.counter is not None else None
        return mark(counter) if counter is not None else None

    def changed(self) -> bool:
        """Whether the values are others; looked at only after the counter was written."""
        if (counted := self._counted()) == self.mark:
            return False
        self.mark, tensor = counted, self.tensor()
        return tensor is not None and not torch.equal(tensor, self.values)


def is_counted(name: str) -> bool:
    return _STATISTICS.search(name) is not None


def _changed(name: str) -> GraphoptError:
    return GraphoptError(
        f"{name} was written after it was folded or read by a rewrite: the optimized module still "
        "computes with its old value",
        fix="compile the model again; in training mode no parameter is folded",
    )


def mark(tensor: Tensor) -> tuple[int, int]:
    """Its version and address: another one where it was written in place, or its data replaced."""
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr()
