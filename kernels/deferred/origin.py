"""Where the numbers of a deferred tensor come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.body import read
from graphopt.kernels.chunked_rows.operands import Operands
from graphopt.kernels.deferred.dense import dense
from graphopt.kernels.deferred.unchanged import Seen


class View(NamedTuple):
    """An operator that gives a view or a cast, and what follows its tensor in a call."""

    operator: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.operator(tensor, *self.args, **self.kwargs)


Views = tuple[View, ...]


def seen_through(views: Views, tensor: Tensor) -> Tensor:
    for view in views:
        tensor = view(tensor)
    return tensor


class Origin(ABC):
    """Numbers that are computed once at most.

    Attributes:
        numel: how many.
        whole: all of them, once they are there. Writes go into it.
    """

    numel: int
    whole: Tensor | None = None

    @abstractmethod
    def fresh(self, views: Views) -> Tensor:
        """The numbers behind views, as they were when this was made; a tensor of its own."""

    def fill(self) -> Tensor:
        if self.whole is None:
            self.whole = self.fresh(())
        return self.whole


class Product(Origin):
    """The matrix ``(N, V)`` that a body gives."""

    def __init__(
        self, operands: Operands[Tensor], body: str, shape: torch.Size, autocast: torch.dtype | None
    ) -> None:
        self.operands = operands.filled(t.detach() for t in operands.all)
        self.body, self.shape, self.autocast = body, shape, autocast
        self.numel = shape.numel()
        self.seen = [Seen(t) for t in self.operands.all]

    def fresh(self, views: Views) -> Tensor:
        for seen in self.seen:
            seen.check()
        with torch.inference_mode(False), torch.no_grad():
            index = self._rows(views)
            if index is None:
                return seen_through(views, self._computed(self.operands))
            part = self._computed(self._part(index.flatten()))
            return part.view(*index.shape, self.shape[1])

    def _rows(self, views: Views) -> Tensor | None:
        """Indices of the rows behind views; ``None`` where it is all, or not whole rows."""
        rows = torch.arange(self.shape[0], device=self.operands.hidden[0].device)
        shown = seen_through(views, rows.unsqueeze(1).expand(self.shape))
        if shown.dim() == 0 or shown.numel() == self.numel:
            return None
        same = shown.shape[-1] == self.shape[1] and shown.stride(-1) == 0
        return shown[..., 0] if same else None

    def _part(self, index: Tensor) -> Operands[Tensor]:
        o = self.operands
        hidden, rows = ([t[index] for t in group] for group in (o.hidden, o.rows))
        return Operands(hidden, o.weight, rows, o.whole)

    def _computed(self, operands: Operands[Tensor]) -> Tensor:
        return dense(read(self.body), operands, self.autocast)


class Cast(Origin):
    """What is behind views, in another dtype."""

    def __init__(self, of: Origin, views: Views, cast: View, numel: int) -> None:
        self.of, self.views, self.cast, self.numel = of, views, cast, numel

    def fresh(self, views: Views) -> Tensor:
        return self.cast(self.of.fresh((*self.views, *views)))
