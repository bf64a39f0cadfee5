"""Repeated blocks: isomorphic parts of a program that follow each other, such as layers.

A shift (`graphopt.analysis.repeats`) maps each layer to the one before; the orbits of its nodes
are then as long as there are layers, and the k-th block is the k-th node of every orbit. Orbits
that go on one step beyond (the final norm looks like the first norm of one more layer) leave open
where a block begins: the cut that the fewest values cross is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import TypeAlias

from torch.fx import Graph, Node

from graphopt.analysis.flow import Flow, flow, reachable
from graphopt.analysis.regions import Region
from graphopt.analysis.repeats import Index, Shift, shifts

Rows: TypeAlias = list[list[Node]]
"""One row per block; corresponding nodes stand at the same place in each."""


@dataclass(frozen=True)
class BlockGroup:
    """Blocks that compute the same function of their inputs and parameters.

    Attributes:
        instances: the blocks in program order, each convex.
        correspondence: for each instance, its nodes mapped to those of the first.
        parameters: the placeholders that the instances read at the same place, one tuple with an
            entry per instance for each place; one that all share appears in every entry.
    """

    instances: list[Region]
    correspondence: list[dict[Node, Node]]
    parameters: list[tuple[Node, ...]]


def find_blocks(graph: Graph, *, min_nodes: int = 5) -> list[BlockGroup]:
    """The repeated blocks of ``graph``, largest groups first, no node in two of them.

    Blocks have at least ``min_nodes`` calls, read parameters and form chains: parallel branches
    (query, key and value) are none. Equal means: operators, literal arguments, shapes, dtypes and
    wiring. Expected time is linear in the graph. Module paths in the metadata only settle ties.
    """
    index = Index(graph)
    found = _search(flow(graph), shifts(index), index.calls, min_nodes)
    return [_group(index, rows) for rows in found]


def _search(view: Flow, given: list[Shift], allowed: set[Node], min_nodes: int) -> list[Rows]:
    """The groups among the ``allowed`` nodes, found by the longest shift first."""
    found: list[Rows] = []
    given = [s for s in given if len(s) >= min_nodes]
    pool = [s.within(allowed) for s in given]
    while pool := [s for s in pool if len(s) >= min_nodes]:
        best = max(pool, key=len)
        if rows := _align(view, best, min_nodes):
            found += _split(view, given, rows, min_nodes)
            allowed = allowed.difference(*rows)
            pool = [s.within(allowed) for s in pool]
        else:
            pool.remove(best)
    return found


def _align(view: Flow, shift: Shift, min_nodes: int) -> Rows:
    """The blocks that ``shift`` carries into each other, or nothing where it gives none."""
    shift = shift.within(shift.allowed)
    shift.ascend()
    orbits = shift.orbits()
    covered = {n: n * sum(len(o) >= n for o in orbits) for n in map(len, orbits)}
    for count in sorted(covered, key=lambda n: (-covered[n], n)):
        template = [orbit for orbit in orbits if len(orbit) >= count]
        if count > 1 and len(template) >= min_nodes:
            rows = _begin(template, count)
            rows = _sound(view, shift.index, rows) or _sound(view, shift.index, _rooted(view, rows))
            if rows and _parameters(shift.index, rows):
                return rows
    return []


def _begin(template: list[list[Node]], count: int) -> Rows:
    """One row per block, each begun where the fewest values pass from one block to the next.

    Orbits longer than ``count`` leave out their first nodes or their last; the longer orbits up to
    some place in the program leave out the first. Ties go to blocks in module paths of their own,
    then to the later beginning: what precedes the first block (an embedding's norm) stays outside.
    """
    longer = [orbit[0] for orbit in template if len(orbit) > count]
    choices = []
    for late in range(len(longer), -1, -1):
        skipped = set(longer[:late])
        kept = [orbit[-count:] if orbit[0] in skipped else orbit[:count] for orbit in template]
        choices.append([list(row) for row in zip(*kept, strict=True)])
    return min(choices, key=lambda rows: (_width(*rows[:2]), _module(rows[0]) == _module(rows[1])))


def _width(first: list[Node], second: list[Node]) -> int:
    """How many values the second block reads from the first."""
    inside = set(second)
    return sum(not inside.isdisjoint(node.users) for node in first)


def _module(row: list[Node]) -> str:
    """The innermost module whose forward made all of the nodes, as far as the metadata says."""
    stacks = (list((node.meta.get("nn_module_stack") or {}).values()) for node in row)
    paths = [str(stack[-1][0]).split(".") for stack in stacks if stack]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in shared)


def _sound(view: Flow, index: Index, rows: Rows) -> Rows:
    """The rows that are convex and wired like the middle one; none if they form no chain."""
    model = rows[len(rows) // 2]
    kept = [row for row in rows if _wired_alike(index, model, row)]
    kept = [row for row in kept if Region(frozenset(row)).is_convex(view)]
    chained = len(kept) > 1 and all(_follows(view, a, b) for a, b in pairwise(kept))
    return kept if chained else []


def _rooted(view: Flow, rows: Rows) -> Rows:
    """The rows without what depends neither on the block before nor on parameters of its own.

    Two layers can each have a mask of their own, computed alike but not from corresponding values.
    """
    before, row = rows[-2:]
    outside = set(before)
    starts = [
        b
        for a, b in zip(before, row, strict=True)
        if not outside.isdisjoint(b.all_input_nodes) or _placeholders(a) != _placeholders(b)
    ]
    kept = reachable(view.subgraph(row), starts)
    places = [i for i, node in enumerate(row) if node in kept]
    return [[each[i] for i in places] for each in rows]


def _placeholders(node: Node) -> list[Node]:
    return [p for p in node.all_input_nodes if p.op == "placeholder"]


def _follows(view: Flow, first: list[Node], second: list[Node]) -> bool:
    """Whether the second block reads from the first and no layer of another kind lies between."""
    both = Region(frozenset(first) | frozenset(second))
    between = both.convex_closure(view).nodes - both.nodes
    return bool(_width(first, second)) and not any(map(_placeholders, between))


def _wired_alike(index: Index, model: list[Node], row: list[Node]) -> bool:
    """Whether one map, one to one, takes every read of ``model`` to that of ``row``."""
    there = dict(zip(model, row, strict=True))
    back = dict(zip(row, model, strict=True))
    return all(
        there.setdefault(a, b) is b and back.setdefault(b, a) is a
        for left, right in zip(model, row, strict=True)
        for a, b in zip(index.reads[left], index.reads[right], strict=True)
    )


def _split(view: Flow, given: list[Shift], rows: Rows, min_nodes: int) -> list[Rows]:
    """Blocks that are themselves mostly a chain of blocks, taken apart.

    Models that alternate kinds of layers (three of one, one of another, and so on) repeat with the
    period of the alternation; each kind becomes a group.
    """
    place = {node: i for i, node in enumerate(rows[0])}
    index = given[0].index
    inner = [
        group
        for group in _search(view, given, set(rows[0]), min_nodes)
        if any(places[0] is not places[1] for places in _parameters(index, group))
    ]
    if 2 * sum(len(row) for group in inner for row in group) < len(rows[0]):
        return [rows]
    spread = [[[row[place[n]] for n in part] for row in rows for part in group] for group in inner]
    rest = sorted(set(place).difference(*(part for group in inner for part in group)))
    others = [[row[place[n]] for n in rest] for row in rows]
    whole = len(rest) >= min_nodes and Region(frozenset(rest)).is_convex(view)
    return [*spread, others] if whole else spread


def _parameters(index: Index, rows: Rows) -> list[tuple[Node, ...]]:
    """The placeholders that corresponding nodes read, in order of first use."""
    reads = zip(*([p for node in row for p in index.reads[node]] for row in rows), strict=True)
    return list(dict.fromkeys(r for r in reads if all(p.op == "placeholder" for p in r)))


def _group(index: Index, rows: Rows) -> BlockGroup:
    """The group with its nodes in the program order of the first block."""
    rows = [list(row) for row in zip(*sorted(zip(*rows, strict=True)), strict=True)]
    return BlockGroup(
        instances=[Region(frozenset(row)) for row in rows],
        correspondence=[dict(zip(row, rows[0], strict=True)) for row in rows],
        parameters=_parameters(index, rows),
    )
