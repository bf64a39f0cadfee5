"""Which bodies need no more of their product than one sweep over it gives, see `sweeping`."""

from __future__ import annotations

from collections.abc import Iterable
from operator import getitem

import torch

from graphopt.kernels.chunked_rows.chain import Chain, chain_of
from graphopt.kernels.chunked_rows.fusing import (
    Kin,
    dependents_of,
    kin_of,
    operands_of,
    readers_of,
)
from graphopt.kernels.chunked_rows.members import (
    Best,
    LogSumExp,
    Loss,
    Member,
    Picked,
    Total,
    reading_best,
)
from graphopt.kernels.chunked_rows.parsing import Name, Parsed, Step
from graphopt.kernels.chunked_rows.summaries import Summaries
from graphopt.kernels.chunked_rows.sweeping import Sweep, picks

aten = torch.ops.aten


def swept(parsed: Parsed) -> Parsed | None:
    """The same program with a `Product` for its first parameter; ``None`` where that will not do.

    It will where all that reads the matrix at the end of the product's chain is a member that a
    sweep serves, all pick the same class, and every result comes from theirs.
    """
    product = Name(parsed.parameters[0])
    chain = chain_of(parsed, product)
    kin = kin_of(parsed, chain.matrix, reading_best)
    late = dependents_of(parsed.steps, kin.results)
    others = dict.fromkeys([*filter(None, [chain.bias]), *operands_of(kin, chain.matrix)])
    if not _is_head(parsed, chain, kin) or late & others.keys() or not late >= {*parsed.results}:
        return None
    own = {*kin.own, *(step.name for step in chain.steps)}
    steps = [step for step in parsed.steps if step.name in own]
    rest = [step for step in parsed.steps if step.name not in own]
    target = Sweep(
        chain,
        Summaries(
            members=[member for _, member in kin.found],
            steps=steps,
            results=[*kin.results, chain.matrix],
            names=[product, *others],
            in_place=False,
        ),
    )
    name = f"sweep of {product}"
    together = Step(name, target, (product, *others), {})
    items = [Step(n, getitem, (Name(name), i), {}) for i, n in enumerate(kin.results)]
    before = [step for step in rest if step.name not in late]
    after = [step for step in rest if step.name in late]
    return parsed._replace(steps=[*before, together, *items, *after])


def wide(parsed: Parsed) -> frozenset[str]:
    """Parameters of a swept program that may have one number for each class.

    Nothing but the sweep reads them: else a matrix might be made of them.
    """
    return frozenset(
        name
        for step in parsed.steps
        if isinstance(step.target, Sweep)
        for name in step.target.per_class
        if readers_of(parsed, name) == [step]
    )


def _is_head(parsed: Parsed, chain: Chain, kin: Kin) -> bool:
    members = [member for _, member in kin.found]
    readers = {step.name for step in readers_of(parsed, chain.matrix)}
    alone = readers <= kin.own and chain.matrix not in parsed.results and not parsed.columns
    served = all(map(_is_served, members)) and kin.normalises
    return alone and served and chain.is_proper and _pick_one(parsed, members)


def _is_served(member: Member) -> bool:
    if isinstance(member, Loss):
        return not member.smoothing or member.weight is None
    return isinstance(member, LogSumExp | Picked | Total | Best)


def _pick_one(parsed: Parsed, members: Iterable[Member]) -> bool:
    """Whether all pick the same class of a row, and ignore the same."""
    found = {
        (_source(parsed, name), ignored) for name, ignored in filter(None, map(picks, members))
    }
    return len(found) <= 1


def _source(parsed: Parsed, name: Name) -> Name:
    """What a column of classes is a view of."""
    steps = {step.name: step for step in parsed.steps}
    views = (aten.unsqueeze.default, aten.squeeze.dim)
    while name in steps and steps[name].target in views and steps[name].args[1] in (1, -1):
        name = steps[name].args[0]
    return name
