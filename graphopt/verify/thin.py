"""Verification of what is too large to be held: on a program of the same nodes with fewer rows.

Certificates must not need the memory or the time that a rewrite saves. Where a pass says along
which axes a large value may be cut (`Pass.axes`), a thin copy of the program takes its place in
verification. Passes run on both; a rewrite counts as verified if the same one was made, and held,
on the thin copy.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import prod
from typing import Any

import sympy
from torch import fx

from graphopt.analysis.axis_rules.sizes import Size, size_of
from graphopt.capture_errors import first_line
from graphopt.errors import GraphoptError
from graphopt.program import Program, val
from graphopt.rewrite.driver import Key, Log, Rewrite, apply_rules
from graphopt.rewrite.passes import Axis, Pass
from graphopt.rewrite.subgraph import Subgraph
from graphopt.room import extent, nbytes
from graphopt.verify.inputs import accepts, first_positions, symbols_of
from graphopt.verify.measure import Measure
from graphopt.verify.replay import Verdict
from graphopt.verify.shorten import shorten
from graphopt.verify.whole import run_program

ROWS = 256
"""Rows that a large value keeps: errors average over ``ROWS x classes`` numbers."""

LARGE = 2**25
"""Bytes below which a value is verified whole."""

FEWEST = 8
"""Positions that each of its axes keeps: shifts and pads by a few must have room."""

_CLOSE = 16
"""Sizes that are tried above the wanted one, for models that ask for multiples of something."""


@dataclass
class Thin:
    """A thin copy of a program, and what became of it pass by pass.

    Attributes:
        original: as captured.
        program: with the passes so far.
        sizes: symbols in the shapes of user inputs that are smaller than in the example.
        apart: keys of rewrites that only the copy would have.
    """

    original: Program
    program: Program
    sizes: Mapping[sympy.Symbol, int] = field(default_factory=dict)
    apart: set[Key] = field(default_factory=set)

    def inputs(self, flat: Sequence[Any]) -> list[Any]:
        """The first positions of flat user inputs."""
        return first_positions(self.original, flat, self.sizes)

    def rewritten(self, step: Pass, banned: Collection[Key], log: Log) -> tuple[Program, Log]:
        """The copy with what the pass did to the program by its ``log``, and nothing else.

        Raises:
            IllegalRewriteError: the rules do not settle.
        """
        keys, rules = {r.key for r in log.rewrites}, step.at_any_size().rules()
        while True:
            work = self.program.copy()
            found = apply_rules(work, rules, {*banned, *self.apart})
            extra = {r.key for r in found.rewrites} - keys - self.apart
            if not extra:
                return work, found
            self.apart |= extra


def transferred(log: Log, thin: Log, verdicts: Mapping[Key, Verdict]) -> dict[Key, Verdict]:
    """The verdicts on rewrites of the thin copy, for those of the program."""
    twins = {r.key: r for r in thin.rewrites}
    return {r.key: _verdict(r, twins.get(r.key), verdicts) for r in log.rewrites}


def _verdict(rewrite: Rewrite, twin: Rewrite | None, verdicts: Mapping[Key, Verdict]) -> Verdict:
    if twin is not None and outline(rewrite) == outline(twin):
        return replace(verdicts[twin.key], rewrite=rewrite)
    reason = "with fewer rows, on which it would be verified, the same rewrite is not made"
    return Verdict(rewrite, Measure(1.0, 1.0, 0.0, 0.0, False, reason))


def outline(rewrite: Rewrite) -> tuple[tuple[Any, ...], ...]:
    """The operators of both pieces and their words, without numbers: sizes are among them."""
    return _outline(rewrite.before), _outline(rewrite.after)


def _outline(piece: Subgraph) -> tuple[Any, ...]:
    calls = (n for n in piece.graph.nodes if n.op == "call_function")
    return tuple((str(n.target), *map(_blanked, _words(n))) for n in calls)


def _words(node: fx.Node) -> list[str]:
    return [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, str)]


def _blanked(text: str) -> str:
    return _NUMBER.sub("#", text)


_NUMBER = re.compile(r"(?<![\w.])\d[\d.]*(?:e[-+]?\d+)?")


def thinned(program: Program, passes: Sequence[Pass], told: list[str]) -> Thin | None:
    """A copy with fewer rows in large values; ``None`` where there are none, or it cannot be made.

    Axes with a symbolic size become short through the example inputs, all others by cutting what
    large values are computed from.

    Args:
        told: gets, in words, what was cut, or why nothing could be.
    """
    twin = program.copy()
    notes: list[str] = []
    sizes: dict[sympy.Symbol, int] = {}
    try:
        for axes in [axes for step in passes for axes in step.axes(twin)]:
            if _is_large(axes) and not _is_cut(axes, sizes):
                note = _cut(twin, axes, sizes)
                notes += [note] if note not in notes else []
        if not notes:
            return None
        twin.example_inputs = tuple(first_positions(twin, twin.example_inputs, sizes))
        run_program(twin, twin.example_inputs, wide=False, grad=False)
    except (GraphoptError, RuntimeError, IndexError, ValueError) as error:
        told.append(f"large values are verified whole: {first_line(error)}")
        return None
    told += notes
    return Thin(twin, twin, sizes)


def _is_large(axes: Sequence[Axis]) -> bool:
    rows = prod(map(_extent, axes))
    return rows > 2 * ROWS and nbytes(val(axes[0][0].node)) >= LARGE


def _is_cut(axes: Sequence[Axis], sizes: Collection[sympy.Symbol]) -> bool:
    """Whether symbols in the sizes of some axes have got smaller values."""
    return any(
        not isinstance(size, int) and not size.free_symbols.isdisjoint(sizes)
        for size in map(_size, axes)
    )


def _size(axis: Axis) -> Size:
    return size_of(val(axis[0].node).shape[axis[0].dim])


def _extent(axis: Axis) -> int:
    return extent(val(axis[0].node).shape[axis[0].dim])


def _cut(program: Program, axes: Sequence[Axis], sizes: dict[sympy.Symbol, int]) -> str:
    """Shorten the axes of one value; those of symbolic size by an entry in ``sizes``."""
    before = [_extent(axis) for axis in axes]
    wanted = _fewer(before)
    for axis, old, new in zip(axes, before, wanted, strict=True):
        size = _size(axis)
        if new == old:
            continue
        if isinstance(size, int):
            shorten(program, axis, new)
        else:
            sizes.update(_symbols(program, size, new, sizes))
    name = axes[0][0].node.name
    return f"`{name}` is verified with {prod(wanted)} of {prod(before)} rows"


def _fewer(sizes: Sequence[int]) -> list[int]:
    """Sizes with a product of about `ROWS`: the largest are cut first."""
    made = list(sizes)
    for largest in sorted(range(len(made)), key=lambda i: -made[i]):
        others = prod(made) // made[largest]
        made[largest] = min(made[largest], max(FEWEST, -(-ROWS // others)))
    return made


def _symbols(
    program: Program, size: sympy.Expr, wanted: int, sizes: Mapping[sympy.Symbol, int]
) -> dict[sympy.Symbol, int]:
    """Values that calls may have for symbols, with which a size is near the wanted one.

    The largest symbol in the size is made smaller; if the program does not take that alone, so are
    those that were as large (labels, whose axes have symbols of their own).
    """
    known = {**symbols_of(program), **sizes}
    symbol = max(size.free_symbols, key=known.__getitem__)
    alike = [s for s, value in known.items() if value == known[symbol]]
    enough = (v for v in range(2, known[symbol]) if size.subs({**known, symbol: v}) >= wanted)
    for value in islice(enough, _CLOSE):
        for together in ([symbol], alike):
            chosen = dict.fromkeys(together, value)
            if accepts(program, {**known, **chosen}):
                return chosen
    raise GraphoptError(f"no smaller size of {symbol} is allowed")
