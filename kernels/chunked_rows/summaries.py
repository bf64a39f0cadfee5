"""One step of a body that stands for all of the cross-entropy kin on one matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.members import Member
from graphopt.kernels.chunked_rows.parsing import Step, filled
from graphopt.kernels.chunked_rows.softmax import Wanted, columns

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Summaries:
    """``f(x, *others)``: what the members give, in their order.

    Attributes:
        members: with names in place of values.
        steps: the operators themselves.
        results: the names of the members' results in these steps.
        names: of the matrix and the others, in these steps.
        in_place: whether nothing else reads the matrix.
    """

    members: Sequence[Member]
    steps: Sequence[Step]
    results: Sequence[str]
    names: Sequence[str]
    in_place: bool

    def __call__(self, *given: Any) -> list[Any]:
        values = dict(zip(self.names, given, strict=True))
        x = given[0]
        if x.dim() != 2 or not x.shape[1] or x.dtype not in _FLOATS:
            return self.plainly(values)
        members = [filled_in(member, values) for member in self.members]
        weights = {id(w): w for m in members if (w := m.weight_of_all) is not None}
        if len(weights) > 1 or not all(m.fits(x) for m in members):
            return self.plainly(values)
        like = self.plainly(values, few=True) if x.element_size() < 4 else None
        made = self._summed_up(x, members, next(iter(weights.values()), None))
        return made if like is None else list(map(cast_as, made, like))

    def _summed_up(self, x: Tensor, members: Sequence[Member], weight: Tensor | None) -> list[Any]:
        places = [m.places(x) for m in members]
        picked = [i for i in places if i is not None]
        wanted = Wanted(
            places=None if not picked else picked[0] if len(picked) == 1 else torch.cat(picked, 1),
            weight=weight,
            total=any(m.total for m in members),
            top=any(m.top for m in members),
            normalised=any(m.normalised for m in members),
            in_place=self.in_place,
        )
        found = columns(x, wanted)
        own = iter(() if found.own is None else found.own.split([i.shape[1] for i in picked], 1))
        parts = [found if i is None else found._replace(own=next(own), places=i) for i in places]
        return [m.give(part) for m, part in zip(members, parts, strict=True)]

    def plainly(self, values: dict[str, Any], *, few: bool = False) -> list[Any]:
        """By the operators themselves.

        Args:
            few: of no rows, for the dtypes of results.
        """
        if few:
            rows = {self.names[0], *(name for m in self.members for name in m.per_row)}
            values = {n: v[:0] if n in rows else v for n, v in values.items()}
        for step in self.steps:
            args, kwargs = filled((step.args, step.kwargs), values)
            values[step.name] = step.target(*args, **kwargs)
        return [values[name] for name in self.results]


def filled_in(member: Member, values: dict[str, Any]) -> Member:
    """With values in place of names."""
    return replace(
        member, **{f.name: filled(getattr(member, f.name), values) for f in fields(member)}
    )


def cast_as(made: Any, like: Any) -> Any:
    """In the dtypes of other results."""
    if isinstance(made, Tensor):
        return made.to(like.dtype)
    return tuple(map(cast_as, made, like))
