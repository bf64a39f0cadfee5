"""How operators on rows are found a handler, and what handlers share.

A handler gives the body's node for a node of the program, a `Total` where rows are reduced too (a
mean over all tokens), `Columns`, or a `Refusal`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

from graphopt.passes.loss_head.totals import Number, Term, Total, reciprocal
from graphopt.program import val
from graphopt.rewrite import Builder, Refusal

if TYPE_CHECKING:
    from graphopt.passes.loss_head.translate import Translation

Found: TypeAlias = fx.Node | Refusal


@dataclass(frozen=True)
class Columns:
    """``log sum exp`` of each column of a body's matrix, over all rows."""

    matrix: fx.Node


Handler = Callable[["Translation", fx.Node, dict[str, Any]], fx.Node | Total | Columns | Refusal]
HANDLERS: dict[str, Handler] = {}
SUMMARIES: set[str] = set()
"""Operators that leave little of the classes, or of everything."""


def handles(*names: str, sums_up: bool = False) -> Callable[[Handler], Handler]:
    def register(function: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, function))
        SUMMARIES.update(names if sums_up else ())
        return function

    return register


def name_of(node: fx.Node) -> str:
    """The name of an operator of ATen; empty for anything else."""
    found = isinstance(node.target, torch._ops.OpOverload)
    return node.target._schema.name.removeprefix("aten::") if found else ""  # type: ignore[union-attr]


def called(t: Translation, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    """The operator of a node on other arguments."""
    schema = node.target._schema  # type: ignore[union-attr]
    keywords = {a.name for a in schema.arguments if a.kwarg_only}
    args = [v for k, v in given.items() if k not in keywords]
    return t.body(node.target, *args, **{k: v for k, v in given.items() if k in keywords})


def over_classes(
    t: Translation, matrix: fx.Node, *, mean: bool, dtype: torch.dtype | None = None
) -> fx.Node:
    """The sum, or the mean, of each row of a body's matrix, as a column."""
    target = torch.ops.aten.mean.dim if mean else torch.ops.aten.sum.dim_IntList
    return t.body(target, matrix, [1], True, **({} if dtype is None else {"dtype": dtype}))


def over_rows(t: Translation, column: fx.Node, main: fx.Node, *, mean: bool) -> Total:
    """The sum, or the mean, of a column over the rows that ``main`` holds."""
    rows = t.rows_of(main)
    if not mean:
        return Total((Term(column, rows),))
    if t.is_counted(rows):
        return Total((Term(column, rows, (lambda build: reciprocal(build, t.count(rows)),)),))

    def number(build: Builder) -> fx.Node:
        kind = {"dtype": torch.float64, "device": val(column).device}
        made: fx.Node = build(torch.ops.aten.scalar_tensor.default, t.count(rows), **kind)
        return made

    def share(build: Builder) -> Number:
        return reciprocal(build, build(torch.ops.aten.clamp.default, number(build), 1))

    def some(build: Builder) -> Number:
        """Whether there are rows; the mean of none is NaN."""
        found: fx.Node = build(torch.ops.aten.gt.Scalar, number(build), 0)
        return found

    return Total((Term(column, rows, (share,)),), (some,))


def dims_named(node: fx.Node, dims: Any) -> set[int]:
    """Dims that a call names, from the front; all where it names none."""
    main: Any = node.args[0]
    rank = val(main).dim()
    listed: Iterable[int]
    if dims is None or dims == []:
        listed = range(rank)
    else:
        listed = [dims] if isinstance(dims, int) else dims
    return {d % rank for d in listed} if rank else set()
