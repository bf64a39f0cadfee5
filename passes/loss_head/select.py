"""Rows that are read from a large product are selected before it.

Models of masked tokens, and losses on answers alone, compute logits of every position and then read
few: ``logits[labels != -100]``. The hidden rows are small; they are selected instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.loss_head import lazy, selections
from graphopt.passes.loss_head.needed import is_head, is_large, needed_whole
from graphopt.passes.loss_head.products import LargeProduct, large_products
from graphopt.passes.loss_head.rowwise import SELECTIONS, Selected, path
from graphopt.passes.loss_head.translate import Translation
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Pass, Profit, Refusal, Rule

aten = torch.ops.aten


class SelectFirst(Rule):
    """``f(h W^T + b)[i] = f(h[i] W^T + b)``, ``f`` acting on rows, ``i`` rows or a mask of them.

    The gradients of a row that is selected twice add up in ``h``, where they are narrow. What else
    is read of the product, summaries of all its rows, reads a product of its own: none is held, at
    the price of computing rows that both read, or that are selected twice, twice.
    """

    profit = Profit.ALWAYS
    benefit = 40
    folds = False

    def __init__(self, min_bytes: int = 0, *, lazy_logits: bool = False) -> None:
        self.min_bytes, self.lazy_logits = min_bytes, lazy_logits

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)

    def find(self, program: Program) -> Iterator[Candidate]:
        paths = selected_rows(program, self.min_bytes)
        for node, (inner, products) in paths.items():
            apart = frozenset(paths)
            yield Candidate(_match(program, node, inner, products, apart, self.lazy_logits))

    def check(self, match: Match) -> Refusal | None:
        refusal: Refusal | None = match["refusal"]
        return refusal

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        selected = Selected(match["products"], match["inner"], build)
        values = {match.root: selected.of(match.root, [])}
        for size in match["sizes"]:
            values[size] = build.size(selected.hidden[0], size.args[1])
        for node, found in match["lazy"].items():
            values[node] = lazy.emit(found, node, build, values)
        return tuple(values[n] for n in match.roots)

    def examples(self) -> Iterable[Example]:
        return selections.examples()

    def near_misses(self) -> Iterable[Example]:
        return selections.near_misses()


Products = Mapping[fx.Node, LargeProduct]


def selected_rows(
    program: Program, min_bytes: int
) -> dict[fx.Node, tuple[Sequence[fx.Node], Products]]:
    """For each selection of rows of large products, the values on the way and the products."""
    large = (p for p in large_products(program) if p.bytes >= min_bytes)
    last = (p for p in large if p.groups == 1 and p.row_dims == tuple(range(p.class_dim)))
    products = {p.node: p for p in last if is_head(p)}
    found: dict[fx.Node, tuple[Sequence[fx.Node], Products]] = {}
    for node in program.graph.nodes:
        if products and node.target in SELECTIONS and (inner := path(node, products)):
            found[node] = (inner, {n: products[n] for n in inner if n in products})
    return found


def _match(
    program: Program,
    node: fx.Node,
    inner: Sequence[fx.Node],
    products: Products,
    apart: frozenset[fx.Node],
    lazy_logits: bool,
) -> Match:
    """A selection, with what reads its number of rows, and logits that only the caller reads."""
    counts = (user for user in node.users if user.target is aten.sym_size.int)
    sizes = [count for count in counts if count.args[1] in range(val(node).dim() - 1)]
    found = [Translation(program, [product]) for product in products.values()]
    later = lazy.returned(program, found) if lazy_logits else None
    refusals = (needed_whole([t], later, apart=apart) for t in found)
    refusal = next(filter(None, refusals), None)
    shown = {n: t for n, t in (later or {}).items() if all(is_large(t, v) for v in t.inside)}
    bound: dict[str, Any] = {"products": products, "inner": frozenset(inner), "sizes": sizes}
    bound |= {"lazy": shown, "refusal": refusal}
    roots = tuple(dict.fromkeys([node, *sizes, *shown]))
    nodes = tuple(dict.fromkeys([*roots, *inner]))
    return Match(program, roots, nodes, bound, frozenset(inner))
