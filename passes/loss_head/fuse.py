"""A region that stands on large products becomes one operator over chunks of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.analysis.axis_rules.sizes import product as volume
from graphopt.analysis.flow import dependents
from graphopt.kernels.chunked_rows import rows_of_chunk
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.canonicalize.asserts import is_idle
from graphopt.passes.canonicalize.spelling import PlainBitwise
from graphopt.passes.loss_head import heads, lazy
from graphopt.passes.loss_head.call import Call
from graphopt.passes.loss_head.groups import SplitClasses
from graphopt.passes.loss_head.needed import is_head, is_large, needed_whole
from graphopt.passes.loss_head.prepare import SpellSummaries
from graphopt.passes.loss_head.products import Factor, LargeProduct, large_products
from graphopt.passes.loss_head.rows import shape_of
from graphopt.passes.loss_head.select import selected_rows
from graphopt.passes.loss_head.translate import Translation
from graphopt.program import Program, val
from graphopt.rewrite import (
    Axis,
    Builder,
    Candidate,
    Cut,
    Example,
    Match,
    Numeric,
    Pass,
    Profit,
    Refusal,
    Rule,
)
from graphopt.rewrite.driver import apply_rules
from graphopt.room import extent
from graphopt.source import source_line

aten = torch.ops.aten


class FuseRowSummaries(Rule):
    """``f(h W^T) = concat of f(h_c W^T)`` over chunks ``c`` of rows, for ``f`` acting on each row.

    Milakov and Gimelshein 2018 for the log-sum-exp; Wijmans et al. 2024 (Cut Cross-Entropy) for
    losses. Here any ``f`` whose operators act on rows one by one, found by following the row and
    the class axis from the product to the row summaries.
    """

    profit = Profit.ALWAYS
    numeric = Numeric.REASSOCIATED
    benefit = 20
    options: Mapping[str, float] = {}

    def __init__(
        self, min_bytes: int, chunk_bytes: int | None, *, lazy_logits: bool = False
    ) -> None:
        self.min_bytes, self.chunk_bytes = min_bytes, chunk_bytes
        self.lazy_logits = lazy_logits

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(), SpellSummaries())

    def examples(self) -> Iterable[Example]:
        return heads.examples()

    def near_misses(self) -> Iterable[Example]:
        return heads.near_misses()

    def find(self, program: Program) -> Iterator[Candidate]:
        for group in _heads(program, self.min_bytes):
            yield Candidate(_match(program, group, lazy_logits=self.lazy_logits))

    def check(self, match: Match) -> Refusal | None:
        return match.get("refusal")

    def remark(self, match: Match) -> str:
        """Bytes of the products, for the example inputs, and how many of them are held."""
        products = {p.made: p for t in match["translations"] for p in t.products}
        names = " and ".join(f"`{node.name}`" for node in products)
        line = source_line(next(iter(products)))
        size = sum(p.bytes for p in products.values())
        held = max(_chunk(t.products, self.chunk_bytes) for t in match["translations"])
        until = ", unless the output is read: it is computed then" if match["lazy"] else ""
        start = f"{names} of {_bytes(size)}{f' ({line})' if line else ''}"
        if held >= size:
            return f"{start} is one chunk of rows: with more it is never held whole{until}"
        saved = f"{_bytes(size - held)} of it are saved, and as much of each matrix made of it"
        return f"{start} is never held whole{until}; {saved}"

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        values: dict[fx.Node, fx.Node] = {}
        for node, found in match["lazy"].items():
            values[node] = lazy.emit(found, node, build, values)
        for found in match["translations"]:
            inside = {*found.inside} - match["lazy"].keys()
            roots = [n for n in match.roots if n in inside]
            values |= Call(found, build, self.chunk_bytes, **self.options).emit(roots)
        return tuple(values[n] for n in match.roots)


def drop_logits(program: Program, min_bytes: int) -> None:
    """Return ``None`` in place of large products that nothing but the output needs whole."""
    dropped: set[fx.Node] = set()
    read = program.copy()  # as it will be read
    apply_rules(read, [PlainBitwise(), SplitClasses(min_bytes)])
    apart = selected_rows(read, min_bytes)
    for group in _heads(read, min_bytes):
        found = Translation(read, group)
        if needed_whole([found], outputs=False, apart=apart) is None:
            dropped.update(n for n in found.values if found.is_matrix(n))
    if not dropped:
        return
    node = program.output_node()
    pairs = zip(program.results(), read.results(), strict=True)
    kept = tuple(None if seen in dropped else value for value, seen in pairs)
    node.args = (kept,)
    program.graph.eliminate_dead_code()
    program.recompile()


def row_axes(program: Program, min_bytes: int) -> list[list[Axis]]:
    """For heads with the same rows, whose results may meet, the axes of the rows.

    Where there are as many columns as rows, theirs too: they are those of another batch
    (contrastive losses), and numbered like the rows by what else is computed on them. The classes
    of a vocabulary are never cut.
    """
    alike: dict[tuple[Any, ...], list[LargeProduct]] = {}
    for product in (p for group in _heads(program, min_bytes) for p in group):
        dims = product.row_dims[: len(product.hidden.order) - 1]  # no group
        rows = [shape_of(product.node)[dim] for dim in dims]
        columns = shape_of(product.node)[product.class_dim]
        alike.setdefault((*rows, rows == [columns]), []).append(product)
    found: list[list[Axis]] = []
    for (*rows, square), group in alike.items():
        found.append([tuple(_row_cut(p, k) for p in group) for k in range(len(rows))])
        if square:
            found.append([tuple(_cut(p.node, p.class_dim, p.weight, 0) for p in group)])
    return found


def _row_cut(product: LargeProduct, which: int) -> Cut:
    return _cut(product.made, product.row_dims[which], product.hidden, which)


def _cut(node: fx.Node, dim: int, factor: Factor, which: int) -> Cut:
    return Cut(node, dim, node.all_input_nodes.index(factor.node), factor.order[which])


def _heads(program: Program, min_bytes: int) -> Iterator[list[LargeProduct]]:
    """Large products of heads; those whose matrices meet (student and teacher) in one list."""
    left = [p for p in large_products(program) if p.bytes >= min_bytes and is_head(p)]
    while left:
        group = [left.pop(0)]
        while (other := next((p for p in left if _meet(group[0], p)), None)) is not None:
            group.append(other)
            left.remove(other)
        yield group


def _meet(one: LargeProduct, other: LargeProduct) -> bool:
    """Whether something is computed from both, and neither from the other."""
    shape = shape_of(one.node)
    if shape != shape_of(other.node) or one.row_dims != other.row_dims:
        return False
    reached = [{p.node, *dependents([p.node])} for p in (one, other)]
    if other.node in reached[0] or one.node in reached[1]:
        return False
    shared = reached[0] & reached[1]
    return any(
        isinstance(val(a), torch.Tensor) and volume(shape_of(a)) == volume(shape)
        for node in shared
        for a in node.all_input_nodes
        if a in (reached[0] ^ reached[1])
    )


def _match(program: Program, group: Sequence[LargeProduct], *, lazy_logits: bool) -> Match:
    """The match of a group, rows being rows; where columns are summarised too, they are rows."""
    translations = [Translation(program, group)]
    turned = [p.turned for p in group]
    later = lazy.returned(program, translations) if lazy_logits else None
    refusal = needed_whole(translations, later)
    if refusal is not None and None not in turned:
        both = [*translations, Translation(program, [t for t in turned if t is not None])]
        later = lazy.returned(program, both) if lazy_logits else None
        if needed_whole(both, later) is None:
            translations, refusal = both, None
    roots = _roots(translations)
    first = group[0].node
    if refusal is None and not roots:
        refusal = Refusal("nothing is summarised per row", first)
    if refusal is not None:
        refusal = replace(refusal, reason=f"{refusal.reason} ({_size(group)})")
        return Match(program, (first,), (first,), {"refusal": refusal})
    inside = dict.fromkeys(n for t in translations for n in t.inside)
    remade = dict.fromkeys(n for t in translations for n in t.remade)
    bound = {"translations": translations, "lazy": later or {}}
    bound |= {f"given {node.name}": node for t in translations for node in t.given}
    roots = sorted([*roots, *(later or ())])
    idle = dict.fromkeys(u for node in inside for u in node.users if is_idle(u))
    made = dict.fromkeys(p.made for p in group)
    nodes = tuple(made | inside | remade | idle)
    return Match(program, tuple(roots), nodes, bound, frozenset(remade))


def _size(products: Iterable[LargeProduct]) -> str:
    return _bytes(sum(p.bytes for p in products))


def _bytes(size: int) -> str:
    large = size >= 1000 * 2**20  # else three digits are enough
    return f"{size / 2**30:.3g} GiB" if large else f"{size / 2**20:.3g} MiB"


def _chunk(products: Sequence[LargeProduct], chunk_bytes: int | None) -> int:
    """Bytes of the products of some rows that are held at a time, at most."""
    classes = [extent(val(p.node).shape[p.class_dim]) * p.groups for p in products]
    row_bytes = sum(n * val(p.node).itemsize for n, p in zip(classes, products, strict=True))
    return row_bytes * rows_of_chunk(row_bytes, val(products[0].node).device, chunk_bytes or 0)


def _roots(translations: Sequence[Translation]) -> list[fx.Node]:
    """Values inside that are read outside."""
    inside = {n for t in translations for n in t.inside}
    products = {p.node for t in translations for p in t.products}
    read = (n for n in inside - products if any(u not in inside for u in n.users))
    return sorted(n for n in read if not any(is_large(t, n) for t in translations if n in t.values))
