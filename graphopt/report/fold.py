"""Graphs as nested boxes: one per module, source line, row of equal blocks, or part of a long list.

The boxes of one level never depend on each other in a circle, so that every level can be drawn from
top to bottom. Where modules are entered more than once in a way that would close a circle, they are
cut into their runs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby, pairwise

import networkx as nx

from graphopt.report.changes import STATE, Change
from graphopt.report.model import NodeView

CROWDED = 16
"""Nodes of one level are put together by source line when there would be more items than this."""

SAME_LINE = 4
"""Fewest nodes of one source line that are worth a box."""

LONG = 40
"""A level with more items than this is cut into parts."""

PART = 24
REPEATED = 3
"""Fewest equal blocks in a row that are shown as one."""


class Kind(StrEnum):
    """Why nodes stand in one box."""

    MODULE = "module"
    LINE = "line"
    REPEAT = "repeat"
    PART = "part"


@dataclass
class Box:
    """A group of nodes that can be shown folded.

    Attributes:
        name: unique in its graph, and the same in the graphs before and after where possible.
        label: what the reader sees; relative to the box around it.
        nodes: positions of all nodes inside, in graph order.
        items: what it shows when unfolded, in topological order: boxes, and positions of nodes.
    """

    name: str
    label: str
    kind: Kind
    nodes: list[int]
    items: list[Item] = field(default_factory=list)


Item = Box | int


@dataclass(frozen=True)
class _Bucket:
    """Nodes that will become one item: a single node, or a box still to be folded."""

    path: tuple[str, ...]
    nodes: tuple[int, ...]
    line: str = ""
    run: int = 0

    @property
    def single(self) -> bool:
        return len(self.nodes) == 1


def reads_of(views: Sequence[NodeView]) -> dict[int, list[int]]:
    """Positions each drawn node reads from; state is not drawn."""
    position = {v.name: i for i, v in enumerate(views) if v.op not in STATE}
    return {i: [position[n] for n in views[i].inputs if n in position] for i in position.values()}


def fold(views: Sequence[NodeView], change: Mapping[str, Change]) -> Box:
    """The whole graph as one box of boxes.

    Args:
        change: what became of each node; blocks are equal only if the same became of them.
    """
    return _Folder(views, change).root()


class _Folder:
    def __init__(self, views: Sequence[NodeView], change: Mapping[str, Change]) -> None:
        self.views = views
        self.change = change
        self.reads = reads_of(views)
        self.paths = {i: tuple(filter(None, views[i].module.split("."))) for i in self.reads}
        self.used: Counter[str] = Counter()

    def root(self) -> Box:
        nodes = tuple(self.reads)
        return Box("", "model", Kind.MODULE, list(nodes), self._items(_Bucket((), nodes)))

    def _items(self, bucket: _Bucket) -> list[Item]:
        buckets = self._acyclic(list(self._partition(bucket)))
        ordered = self._ordered(buckets)
        items = [self._item(b, len(bucket.path)) for b in ordered]
        return self._in_parts(self._repeats(ordered, items), ".".join(bucket.path))

    def _partition(self, bucket: _Bucket) -> Iterator[_Bucket]:
        """One bucket per child module; nodes of the module itself alone, or by line if many."""
        depth = len(bucket.path)
        children: dict[str, list[int]] = defaultdict(list)
        own: list[int] = []
        for node in bucket.nodes:
            deeper = not bucket.line and len(self.paths[node]) > depth
            children[self.paths[node][depth]].append(node) if deeper else own.append(node)
        for name, nodes in children.items():
            yield self._narrowed(_Bucket((*bucket.path, name), tuple(nodes)))
        crowded = not bucket.line and len(own) + len(children) > CROWDED
        yield from self._by_line(bucket.path, own) if crowded else _alone(bucket.path, own)

    def _narrowed(self, bucket: _Bucket) -> _Bucket:
        """Go down while a module holds nothing but one child: ``encoder`` to ``encoder.layer``."""
        depth = len(bucket.path)
        names = {self.paths[n][depth : depth + 1] for n in bucket.nodes}
        if len(names) != 1 or names == {()}:
            return bucket
        return self._narrowed(_Bucket(bucket.path + names.pop(), bucket.nodes))

    def _by_line(self, path: tuple[str, ...], own: Sequence[int]) -> Iterator[_Bucket]:
        lines: dict[str, list[int]] = defaultdict(list)
        for node in own:
            lines[self.views[node].source or ""].append(node)
        for line, nodes in lines.items():
            if line and len(nodes) >= SAME_LINE:
                yield _Bucket(path, tuple(nodes), line)
            else:
                yield from _alone(path, nodes)

    def _acyclic(self, buckets: list[_Bucket]) -> list[_Bucket]:
        """Open or cut buckets until none depends on itself through others."""
        while True:
            components = nx.strongly_connected_components(self._quotient(buckets))
            knots = [sorted(c) for c in components if len(c) > 1]
            if not knots:
                return buckets
            tangled = {i for knot in knots for i in knot}
            kept = [b for i, b in enumerate(buckets) if i not in tangled]
            loosened = (b for knot in knots for b in self._loosen([buckets[i] for i in knot]))
            buckets = [*kept, *loosened]

    def _loosen(self, knot: list[_Bucket]) -> Iterator[_Bucket]:
        """Containers without nodes of their own give way to their children; others are cut."""
        containers = {b for b in knot if self._is_container(b)}
        if not containers:
            yield from _runs(knot)
            return
        for bucket in knot:
            if bucket in containers:
                yield from self._partition(bucket)
            else:
                yield bucket

    def _is_container(self, bucket: _Bucket) -> bool:
        depth = len(bucket.path)
        return not (bucket.line or bucket.run or bucket.single) and all(
            len(self.paths[n]) > depth for n in bucket.nodes
        )

    def _quotient(self, buckets: Sequence[_Bucket]) -> nx.DiGraph[int]:
        owner = {node: i for i, b in enumerate(buckets) for node in b.nodes}
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(range(len(buckets)))
        for node, mine in owner.items():
            others = (owner.get(read, mine) for read in self.reads[node])
            graph.add_edges_from((other, mine) for other in others if other != mine)
        return graph

    def _ordered(self, buckets: Sequence[_Bucket]) -> list[_Bucket]:
        order = nx.lexicographical_topological_sort(
            self._quotient(buckets), key=lambda i: buckets[i].nodes[0]
        )
        return [buckets[i] for i in order]

    def _item(self, bucket: _Bucket, depth: int) -> Item:
        if bucket.single:
            return bucket.nodes[0]
        label = _label(bucket.path, depth)
        if bucket.line:
            label = bucket.line.replace("\\", "/").rpartition("/")[2]
        name = ".".join(bucket.path) + (f"@{label}" if bucket.line else "")
        suffix = f" #{bucket.run}" if bucket.run else ""
        kind = Kind.LINE if bucket.line else Kind.MODULE
        box = Box(self._unique(name + suffix), label + suffix, kind, list(bucket.nodes))
        return _joined(box, self._items(bucket))

    def _unique(self, name: str) -> str:
        self.used[name] += 1
        return name if self.used[name] == 1 else f"{name}~{self.used[name]}"

    def _repeats(self, buckets: Sequence[_Bucket], items: Sequence[Item]) -> list[Item]:
        """Neighbours with the same structure and successive numbers, put in one box."""
        found: list[Item] = []
        pairs = list(enumerate(zip(buckets, items, strict=True)))
        for _, run in groupby(pairs, lambda pair: self._block_key(pair[0], *pair[1])):
            blocks = [item for _, (_, item) in run]
            found += [self._repeat(blocks)] if len(blocks) >= REPEATED else blocks
        return found

    def _block_key(self, position: int, bucket: _Bucket, item: Item) -> tuple[object, ...]:
        """Equal for neighbours that are copies: number minus position is constant in a row."""
        last = bucket.path[-1] if bucket.path else ""
        if isinstance(item, int) or not last.isdecimal():
            return ("alone", position)
        return (int(last) - position, bucket.path[:-1], self._structure(item, len(bucket.path)))

    def _structure(self, box: Box, depth: int) -> tuple[object, ...]:
        inside = {node: i for i, node in enumerate(box.nodes)}
        return tuple(
            (
                self.views[n].op,
                self.views[n].shape,
                self.views[n].literals,
                self.change.get(self.views[n].name),
                self.paths[n][depth:],
                tuple(inside.get(r, -1) for r in self.reads[n]),
            )
            for n in box.nodes
        )

    def _repeat(self, blocks: Sequence[Item]) -> Box:
        boxes = [b for b in blocks if isinstance(b, Box)]
        first, last = boxes[0], boxes[-1]
        number = last.label.rpartition(".")[2]
        label = f"{first.label} … {number}"
        nodes = [n for b in boxes for n in b.nodes]
        return Box(self._unique(f"{first.name}…{number}"), label, Kind.REPEAT, nodes, list(blocks))

    def _in_parts(self, items: list[Item], path: str) -> list[Item]:
        """Cut a long list into parts, and a long list of parts again."""
        if len(items) <= LONG:
            return items
        count = -(-len(items) // PART)
        cuts = [round(i * len(items) / count) for i in range(count + 1)]
        parts: list[Item] = []
        for i, (start, end) in enumerate(pairwise(cuts)):
            label = f"part {i + 1} of {count}"
            nodes = sorted(n for item in items[start:end] for n in nodes_of(item))
            name = self._unique(f"{path}/{label}")
            parts.append(Box(name, label, Kind.PART, nodes, items[start:end]))
        return self._in_parts(parts, path)


def _label(path: tuple[str, ...], depth: int) -> str:
    """The path below ``depth``; a mere number is said with the list it counts: ``layer.0``."""
    numbered = depth < len(path) and path[depth].isdecimal()
    return ".".join(path[depth - 1 if numbered and depth else depth :])


def _joined(box: Box, items: list[Item]) -> Box:
    """``box`` around ``items``; around a single box, the two become one: ``layer.0 … 5``."""
    only = items[0] if len(items) == 1 else None
    if not isinstance(only, Box):
        box.items = items
        return box
    inner = only.label.removeprefix(f"{box.label.rpartition('.')[2]}.")
    return Box(box.name, f"{box.label}.{inner}", only.kind, box.nodes, only.items)


def _alone(path: tuple[str, ...], nodes: Iterable[int]) -> Iterator[_Bucket]:
    return (_Bucket(path, (node,)) for node in nodes)


def _runs(knot: Sequence[_Bucket]) -> Iterator[_Bucket]:
    """Cut buckets wherever another of the knot comes between; intervals of an order are acyclic."""
    owner = sorted((node, i) for i, bucket in enumerate(knot) for node in bucket.nodes)
    seen: Counter[int] = Counter()
    for i, run in groupby(owner, lambda pair: pair[1]):
        seen[i] += 1
        nodes = tuple(node for node, _ in run)
        bucket = knot[i]
        yield _Bucket(bucket.path, nodes, bucket.line, 0 if bucket.single else seen[i])


def nodes_of(item: Item) -> list[int]:
    """Positions of the nodes an item holds."""
    return [item] if isinstance(item, int) else item.nodes
