"""Operators that summarise the rows of one matrix, as the cross entropy does, become one step.

They share one softmax, whose buffer is the matrix itself where nothing else needs it. What reads
none of their results is done before that step, all else after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch._ops import OpOverload

from graphopt.kernels.chunked_rows.members import Member, is_log, normalises, reading
from graphopt.kernels.chunked_rows.parsing import Name, Parsed, Step, names
from graphopt.kernels.chunked_rows.summaries import Summaries

aten = torch.ops.aten

_FRESH = frozenset(
    {
        aten._to_copy.default, aten.add.Scalar, aten.add.Tensor, aten.clone.default,
        aten.div.Scalar, aten.div.Tensor, aten.masked_fill.Scalar, aten.mul.Scalar,
        aten.mul.Tensor, aten.neg.default, aten.rsub.Scalar, aten.sub.Scalar, aten.sub.Tensor,
        aten.where.ScalarOther, aten.where.self,
    }
)  # fmt: skip
"""Operators that give memory of their own and whose gradients do not need what they gave."""

_BRIEF = frozenset({aten.argmax.default, aten.argmin.default})
"""Operators that leave nothing to do with their matrix once they have run."""


def fused(parsed: Parsed) -> Parsed:
    """The same program, with one step for the kin on each matrix."""
    for name in [*parsed.parameters, *(step.name for step in parsed.steps)]:
        parsed = _fused(parsed, Name(name))
    return parsed


Reading = tuple[Step, Member]


@dataclass(frozen=True)
class Kin:
    """The members on one matrix with their steps, and the log-softmaxes between."""

    found: Sequence[Reading]
    logs: Sequence[Step]

    @property
    def results(self) -> list[str]:
        return [step.name for step, _ in self.found]

    @property
    def own(self) -> set[str]:
        return {*self.results, *(step.name for step in self.logs)}

    @property
    def normalises(self) -> bool:
        """Whether a softmax is needed."""
        return any(normalises(step.target) for step in (*self.logs, *(s for s, _ in self.found)))


def _fused(parsed: Parsed, matrix: Name) -> Parsed:
    kin = kin_of(parsed, matrix)
    if not kin.normalises:
        return parsed
    late = dependents_of(parsed.steps, kin.results)
    others = operands_of(kin, matrix)
    if late & others.keys():
        return parsed
    rest = [step for step in parsed.steps if step.name not in kin.own]
    before = [step for step in rest if step.name not in late]
    after = [step for step in rest if step.name in late]
    name = f"summaries of {matrix}"
    target = Summaries(
        members=[member for _, member in kin.found],
        steps=[step for step in parsed.steps if step.name in kin.own],
        results=kin.results,
        names=[matrix, *others],
        in_place=_is_free(parsed, matrix, kin),
    )
    together = Step(name, target, (matrix, *others), {})
    items = [Step(n, getitem, (Name(name), i), {}) for i, n in enumerate(kin.results)]
    return parsed._replace(steps=[*before, together, *items, *after])


def kin_of(parsed: Parsed, matrix: Name, read: Callable[..., Member | None] = reading) -> Kin:
    """What reads a matrix and is of the kin.

    Args:
        read: which members there are, see `reading`.
    """
    found, logs = [], []
    for step in readers_of(parsed, matrix):
        inner = _inner(parsed, step, read)
        if inner:
            logs.append(step)
            found += inner
        elif (member := _member(step, matrix, read, of_log=False)) is not None:
            found.append((step, member))
    return Kin(found, logs)


def _inner(parsed: Parsed, step: Step, read: Callable[..., Member | None]) -> list[Reading]:
    """What reads a log-softmax; nothing where not all of that are members."""
    log = Name(step.name)
    if not is_log(step.target, arguments_of(step)) or log in parsed.results:
        return []
    readers = readers_of(parsed, log)
    members = [_member(reader, log, read, of_log=True) for reader in readers]
    return [(r, m) for r, m in zip(readers, members, strict=True) if m] if all(members) else []


def _member(
    step: Step, matrix: Name, read: Callable[..., Member | None], *, of_log: bool
) -> Member | None:
    given = arguments_of(step)
    alone = given.get("self") == matrix and list(names(step)).count(matrix) == 1
    return read(step.target, given, of_log=of_log) if alone else None


def arguments_of(step: Step) -> dict[str, Any]:
    """The arguments of a step by name."""
    if not isinstance(step.target, OpOverload):
        return {}
    schema = step.target._schema.arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    positional = zip((a.name for a in schema), step.args, strict=False)
    return {**given, **dict(positional), **step.kwargs}


def operands_of(kin: Kin, matrix: Name) -> dict[str, None]:
    """What the members read besides, in order."""
    inside = {matrix, *(step.name for step in kin.logs)}
    return dict.fromkeys(n for step, _ in kin.found for n in names(step) if n not in inside)


def readers_of(parsed: Parsed, name: Name) -> list[Step]:
    return [step for step in parsed.steps if name in names(step)]


def dependents_of(steps: Sequence[Step], results: Iterable[str]) -> set[str]:
    """These values and all that is computed from them."""
    late = set(results)
    for step in steps:
        if not late.isdisjoint(names(step)):
            late.add(step.name)
    return late


def _is_free(parsed: Parsed, matrix: Name, kin: Kin) -> bool:
    """Whether a matrix can be written over once the members have read it."""
    maker = next((step for step in parsed.steps if step.name == matrix), None)
    if matrix in parsed.results or not (maker is None or maker.target in _FRESH):
        return False
    readers = readers_of(parsed, matrix)
    return all(step.name in kin.own or step.target in _BRIEF for step in readers)
