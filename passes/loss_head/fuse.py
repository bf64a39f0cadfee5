"""A region that stands on large products becomes one operator over chunks of its rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.analysis.axis_rules.sizes import product as volume
from graphopt.analysis.flow import dependents
from graphopt.kernels.chunked_rows import allowed
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.canonicalize.asserts import is_idle
from graphopt.passes.loss_head import heads, lazy
from graphopt.passes.loss_head.call import Call
from graphopt.passes.loss_head.handlers import summarises
from graphopt.passes.loss_head.prepare import SpellSummaries
from graphopt.passes.loss_head.products import PRODUCTS, Factor, LargeProduct, large_products
from graphopt.passes.loss_head.rows import shape_of
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
from graphopt.source import source_line

aten = torch.ops.aten

OPTIONS = (
    "FuseLossHead:lazy_logits=True or FuseLossHead:drop_logits=True",
    "FuseLossHead:drop_logits=True",
)
"""What allows logits among the outputs, before and after lazy ones were tried."""


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
        """Bytes of the products, for the example inputs, that are never held."""
        products = {p.node: p for t in match["translations"] for p in t.products}
        names = " and ".join(f"`{node.name}`" for node in products)
        size = _size(products.values())
        line = source_line(next(iter(products)))
        until = ", unless the output is read: it is computed then" if match["lazy"] else ""
        return f"{names} of {size}{f' ({line})' if line else ''} is never held whole{until}"

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        values: dict[fx.Node, fx.Node] = {}
        for node, found in match["lazy"].items():
            values[node] = lazy.emit(found, node, build, values)
        for found in match["translations"]:
            inside = {*found.inside} - match["lazy"].keys()
            roots = [n for n in match.roots if n in inside]
            values |= Call(found, build, self.chunk_bytes, **self.options).emit(roots)
        return tuple(values[n] for n in match.roots)


def _is_large(found: Translation, node: fx.Node) -> bool:
    """Whether a value inside cannot be a result: a matrix, or several values as one."""
    return found.is_matrix(node) or not isinstance(val(node), torch.Tensor)


def _is_head(head: LargeProduct) -> bool:
    """Whether the classes end in summaries, and in no further product: no inner layer is a head."""
    ends, seen, queue = False, {head.node}, [head.node]
    while queue:
        for user in queue.pop().users:
            if user.target in PRODUCTS:
                return False
            if summarises(user):
                ends = True
            elif user not in seen and user.op == "call_function":
                seen.add(user)
                queue.append(user)
    return ends


def drop_logits(program: Program, min_bytes: int) -> None:
    """Return ``None`` in place of large products that nothing but the output needs whole."""
    dropped: set[fx.Node] = set()
    for group in _heads(program, min_bytes):
        found = Translation(program, group)
        if _refusal([found], outputs=False) is None:
            dropped.update(n for n in found.values if found.is_matrix(n))
    if not dropped:
        return
    node = program.output_node()
    kept = tuple(None if value in dropped else value for value in program.results())
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
        rows = [shape_of(product.node)[dim] for dim in product.row_dims]
        columns = shape_of(product.node)[product.class_dim]
        alike.setdefault((*rows, rows == [columns]), []).append(product)
    found: list[list[Axis]] = []
    for (*rows, square), group in alike.items():
        found.append([tuple(_row_cut(p, k) for p in group) for k in range(len(rows))])
        if square:
            found.append([tuple(_cut(p.node, p.class_dim, p.weight, 0) for p in group)])
    return found


def _row_cut(product: LargeProduct, which: int) -> Cut:
    return _cut(product.node, product.row_dims[which], product.hidden, which)


def _cut(node: fx.Node, dim: int, factor: Factor, which: int) -> Cut:
    return Cut(node, dim, node.all_input_nodes.index(factor.node), factor.order[which])


def _heads(program: Program, min_bytes: int) -> Iterator[list[LargeProduct]]:
    """Large products of heads; those whose matrices meet (student and teacher) in one list."""
    left = [p for p in large_products(program) if p.bytes >= min_bytes and _is_head(p)]
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
    refusal = _refusal(translations, later)
    if refusal is not None and None not in turned:
        both = [*translations, Translation(program, [t for t in turned if t is not None])]
        later = lazy.returned(program, both) if lazy_logits else None
        if _refusal(both, later) is None:
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
    roots = sorted([*roots, *(later or ())])
    idle = dict.fromkeys(u for node in inside for u in node.users if is_idle(u))
    nodes = tuple(inside | remade | idle)
    return Match(program, tuple(roots), nodes, bound, frozenset(remade))


def _size(products: Iterable[LargeProduct]) -> str:
    return f"{sum(p.bytes for p in products) / 2**20:.3g} MiB"


def _roots(translations: Sequence[Translation]) -> list[fx.Node]:
    """Values inside that are read outside."""
    inside = {n for t in translations for n in t.inside}
    products = {p.node for t in translations for p in t.products}
    read = (n for n in inside - products if any(u not in inside for u in n.users))
    return sorted(
        n for n in read if not any(_is_large(t, n) for t in translations if n in t.values)
    )


def _refusal(
    translations: Sequence[Translation],
    later: Mapping[fx.Node, Translation] | None = None,
    *,
    outputs: bool = True,
) -> Refusal | None:
    """A matrix that is read outside, and why its reader is not inside.

    Args:
        later: matrices that can be computed when the output is read; ``None`` where none may be.
        outputs: whether the model's output counts as a reader.
    """
    inside = {n for t in translations for n in t.inside}
    for node in {n: None for t in translations for n in t.values if _is_large(t, n)}:
        for user in node.users:
            if later and node in later and lazy.shows(user, later[node]):
                continue
            if user.op == "output":
                if outputs:
                    reason = f"`{node.name}` is an output of the model"
                    return Refusal(reason, node, OPTIONS[0] if later is None else OPTIONS[1])
            elif user not in inside and val(user) is not None:
                why = translations[0].outside[user]
                return Refusal(f"{why.reason}, so all of `{node.name}` is needed", why.node or user)
    for t in translations:
        for node in t.body.graph.nodes:
            if node.op == "call_function" and not allowed(node.target):
                return Refusal(f"{node.target} has no place in a body", t.products[0].node)
    return None
