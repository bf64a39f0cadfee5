"""Layered drawings of one level: which item stands in which row, and in which order.

The method of Sugiyama, Tagawa and Toda (1981): longest-path ranks, lanes for edges that span
several rows, and barycentre sweeps against crossings. All edges of one source share a lane.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx

from graphopt.report.fold import Box, nodes_of

SWEEPS = 6

Edge = tuple[int, int]
Rows = list[list[int]]
Neighbours = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Level:
    """The drawing of an unfolded box.

    Items are numbered by position; two more numbers stand for the top edge of the box
    (``len(items)``), where values from outside come in, and the bottom edge (``len(items) + 1``).

    Attributes:
        rows: item numbers from top to bottom, left to right; ``-1 - n`` is the lane of item ``n``.
        edges: pairs of item numbers.
    """

    rows: Rows
    edges: list[Edge]


def level(box: Box, reads: Neighbours, users: Neighbours) -> Level:
    """Arrange the items of ``box``; ``reads`` and ``users`` are neighbours by node position."""
    edges = _edges(box, reads, users)
    ranks = _ranks(len(box.items), edges)
    return Level(_sorted_rows(_rows(ranks, edges), edges, ranks), sorted(edges))


def _edges(box: Box, reads: Neighbours, users: Neighbours) -> set[Edge]:
    """Edges between items, and to and from the edges of the box."""
    top, bottom = len(box.items), len(box.items) + 1
    owner = {node: i for i, item in enumerate(box.items) for node in nodes_of(item)}
    found = set()
    for node, mine in owner.items():
        found |= {(owner.get(read, top), mine) for read in reads[node]}
        found |= {(mine, bottom) for user in users.get(node, ()) if user not in owner}
    return {(a, b) for a, b in found if a != b}


def _ranks(count: int, edges: Iterable[Edge]) -> dict[int, int]:
    """Row of every number: longest path from the top.

    What does not depend on the top edge (constants, mostly) moves down next to its users.
    """
    top, bottom = count, count + 1
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(edge for edge in edges if top not in edge and bottom not in edge)
    rows = list(nx.topological_generations(graph))
    ranks = {n: i + 1 for i, row in enumerate(rows) for n in row}
    order = [n for row in rows for n in row]
    hanging = {b for a, b in edges if a == top}
    for node in order:
        if not hanging.isdisjoint(graph.predecessors(node)):
            hanging.add(node)
    for node in reversed(order):
        if node not in hanging and graph.out_degree(node):
            ranks[node] = min(ranks[user] for user in graph.successors(node)) - 1
    return ranks | {top: 0, bottom: max(ranks.values(), default=0) + 1}


def _rows(ranks: Mapping[int, int], edges: Iterable[Edge]) -> Rows:
    """Items and lanes by row, items first; the edges of the box only where something crosses."""
    touched = {n for edge in edges for n in edge}
    count = len(ranks) - 2
    rows: Rows = [[] for _ in range(max(ranks.values()) + 1)]
    for number, rank in ranks.items():
        if number < count or number in touched:
            rows[rank].append(number)
    reach: dict[int, int] = defaultdict(int)
    for source, target in edges:
        reach[source] = max(reach[source], ranks[target])
    for source in sorted(reach):
        for rank in range(ranks[source] + 1, reach[source]):
            rows[rank].append(-1 - source)
    return rows


def _sorted_rows(rows: Rows, edges: Iterable[Edge], ranks: Mapping[int, int]) -> Rows:
    """Order each row by the mean position of its neighbours above, then below, in turn."""
    above: list[dict[int, list[int]]] = [defaultdict(list) for _ in rows]
    below: list[dict[int, list[int]]] = [defaultdict(list) for _ in rows]
    for rank, upper, lower in {s for edge in edges for s in _segments(edge, ranks)}:
        above[rank + 1][lower].append(upper)
        below[rank][upper].append(lower)
    for _ in range(SWEEPS if max(map(len, rows)) > 1 else 0):
        old = list(rows)
        for rank in range(1, len(rows)):
            rows[rank] = _by_barycentre(rows[rank], above[rank], rows[rank - 1])
        for rank in range(len(rows) - 2, -1, -1):
            rows[rank] = _by_barycentre(rows[rank], below[rank], rows[rank + 1])
        if rows == old:
            break
    return rows


def _segments(edge: Edge, ranks: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """An edge as ``(row, upper, lower)`` steps from row to row, through the lane of its source."""
    source, target = edge
    first, last = ranks[source], ranks[target]
    stops = [source, *[-1 - source] * (last - first - 1), target]
    return [(first + i, a, b) for i, (a, b) in enumerate(pairwise(stops))]


def _by_barycentre(
    row: list[int], neighbours: Mapping[int, list[int]], fixed: Sequence[int]
) -> list[int]:
    if len(row) < 2:
        return row
    place = {n: i - (len(fixed) - 1) / 2 for i, n in enumerate(fixed)}
    mine = {n: i - (len(row) - 1) / 2 for i, n in enumerate(row)}
    means = {
        n: sum(place[m] for m in found) / len(found) if (found := neighbours.get(n)) else mine[n]
        for n in row
    }
    return sorted(row, key=means.__getitem__)
