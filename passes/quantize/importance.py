"""What rows count in the second moment of a product's inputs: importance of tokens.

Sung et al. 2025, "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs", section 4:
GPTQ minimises ``|(W - Q) X R|^2``, R diagonal, so that its Hessian is ``X R^2 X.T``. Scores s of
the tokens of a sample become ``r = r_min + (1 - r_min) (s - min s) / (max s - min s)``.

* ``"attention"`` (AttnCon): how much attention a token gets, ``s_j = sum over heads m and queries i
  of A[m, i, j]``, in the attention that a product leads to with no other product between, else in
  the last one before it. Which rows are the tokens that are attended to, the axes say.
* ``"norm"`` (ActNorm): the length of the row itself.
* ``"frequency"`` (TokenFreq): tokens count the less the more often calibration inputs have them, as
  ids that a table is looked up by.
* ``"first"`` (First-N): the first tokens of a sequence count 1, and the others what counts least:
  a quarter of them, or as many as ``"first:64"`` says. What comes first the attention says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx

from graphopt.analysis.axes import AxisFlow, trace_axis
from graphopt.analysis.axis_rules.placement import Placement
from graphopt.analysis.flow import ancestors
from graphopt.calibration import Stream
from graphopt.errors import GraphoptError
from graphopt.passes.quantize.token_scores import (
    LEAST,
    by_token,
    first_tokens,
    rarities,
    scaled,
    sizes_of,
    tokens_of,
)
from graphopt.program import Program, val
from graphopt.rewrite import arguments

KINDS = ("attention", "norm", "frequency", "first")

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


class Link(NamedTuple):
    """A product's rows as the tokens that an attention looks at, or a table is looked up by."""

    source: fx.Node
    flow: AxisFlow


class Importance:
    """Squares of r for the rows that products are given.

    Attributes:
        links: by product, where its importance comes from.
        unknown: products all of whose rows count the same, and why.
        scores: by attention or table, and by sample, what each token gets of it.
    """

    def __init__(
        self,
        program: Program,
        samples: Sequence[Sequence[Any]],
        products: Iterable[fx.Node],
        kind: str | None,
    ) -> None:
        name, _, count = (kind or "").partition(":")
        self.kind, self.links, self.unknown = name, dict[fx.Node, Link](), dict[fx.Node, str]()
        self.scores: dict[fx.Node, list[Tensor]] = {}
        self.sizes: list[dict[sympy.Symbol, int]] = []
        if name in ("attention", "first"):
            self.sizes = [sizes_of(program, sample) for sample in samples]
            flows = _flows(program.graph)
            for product in products:
                self._link(product, flows)
        if name == "first":
            first = int(count) if count else None
            for attention, flow in dict(self.links.values()).items():
                self.scores[attention] = [
                    first_tokens(attention, flow, s, first) for s in self.sizes
                ]
        if name == "frequency":
            self.sizes = [sizes_of(program, sample) for sample in samples]
            tables = _tables(program)
            for product in products:
                self._look_up(product, tables)
            for table in {link.source for link in self.links.values()}:
                self.scores[table] = rarities(program, samples, arguments(table)["indices"])

    @property
    def attentions(self) -> list[fx.Node]:
        """Those that are looked at as samples pass."""
        if self.kind != "attention":
            return []
        return list(dict.fromkeys(link.source for link in self.links.values()))

    def _look_up(self, product: fx.Node, tables: Mapping[fx.Node, AxisFlow]) -> None:
        for table, flow in tables.items():
            if flow.places(arguments(product)["input"]):
                self.links[product] = Link(table, flow)
                return
        self.unknown[product] = (
            "no token ids are known to be what its rows hold, as far as the axes are known: "
            "all rows count the same"
            if tables
            else "the model looks no table up by its inputs: all rows count the same"
        )

    def _link(self, product: fx.Node, flows: Mapping[fx.Node, AxisFlow | None]) -> None:
        order = {node: i for i, node in enumerate(product.graph.nodes)}
        led = [a for a in flows if product in _leading(a)]
        before = [a for a in flows if order[a] < order[product]]
        for attention in (*led, *reversed(before)):
            flow = flows[attention]
            if flow is not None and flow.places(arguments(product)["input"]):
                self.links[product] = Link(attention, flow)
                return
        self.unknown[product] = (
            "no attention looks at what its rows hold, as far as the axes are known: "
            "all rows count the same"
            if flows
            else "the model has no attention: all rows count the same"
        )

    def watch(self, attention: fx.Node, stream: Stream) -> None:
        """Keep what tokens get of an attention whose inputs are there."""
        given = arguments(attention)
        names = ("query", "key", "attn_mask")
        held = {n: given[n] for n in names if isinstance(given[n], fx.Node)}
        columns = {name: stream.given(node) for name, node in held.items()}
        flow = next(link.flow for link in self.links.values() if link.source is attention)
        rows = [dict(zip(columns, row, strict=True)) for row in _rows(columns)]
        self.scores[attention] = [
            by_token(attention, flow, {**given, **row}, sizes)
            for row, sizes in zip(rows, self.sizes, strict=True)
        ]

    def miss(self, attention: fx.Node) -> None:
        """Samples went past an attention before anybody looked."""
        for product in [n for n, link in self.links.items() if link.source is attention]:
            del self.links[product]
            self.unknown[product] = (
                f"`{attention.name}` is in another block: all rows count the same"
            )

    def of(self, product: fx.Node, samples: Iterable[Tensor]) -> Iterator[Tensor] | None:
        """Squares of r ``(...)`` for tensors of rows ``(..., K)``; ``None`` where all count 1."""
        if self.kind == "norm":
            return (scaled(x.float().norm(dim=-1)).square() for x in samples)
        if product not in self.links:
            return None
        return self._scored(product, samples)

    def keep(self, products: Iterable[fx.Node]) -> None:
        """Forget what none of these products needs."""
        wanted = {self.links[n].source for n in products if n in self.links}
        self.scores = {n: gets for n, gets in self.scores.items() if n in wanted}

    def _scored(self, product: fx.Node, samples: Iterable[Tensor]) -> Iterator[Tensor]:
        source, flow = self.links[product]
        node = arguments(product)["input"]
        for x, scores, sizes in zip(samples, self.scores[source], self.sizes, strict=True):
            tokens = tokens_of(flow, node, sizes, x.dim()).to(x.device).expand(x.shape[:-1])
            known = (tokens >= 0) & (tokens < len(scores))
            made = scaled(scores.to(x.device))[tokens.clamp(0, len(scores) - 1)]
            yield torch.where(known, made, LEAST).square()


def checked(kind: Any) -> None:
    """Whether it is one of `KINDS`, ``first`` perhaps with a number.

    Raises:
        ValueError: it is not.
    """
    name, colon, count = str(kind).partition(":")
    is_number = count.isascii() and count.isdigit() and int(count) > 0
    if name not in KINDS or (colon and not (name == "first" and is_number)):
        known = ", ".join(f"'{k}'" for k in KINDS)
        raise ValueError(f"importance={kind!r:.80} is none of {known}, or such as 'first:64'")


def _rows(columns: Mapping[str, Iterator[Any]]) -> Iterator[tuple[Any, ...]]:
    return zip(*columns.values(), strict=True)


def _tables(program: Program) -> dict[fx.Node, AxisFlow]:
    """Look-ups by what users give, and the tokens of each, followed; of large tables first."""
    users, found = set(program.user_inputs()), dict[fx.Node, AxisFlow]()
    for node in program.graph.find_nodes(op="call_function", target=aten.embedding.default):
        given = arguments(node)["indices"]
        if users.isdisjoint(ancestors([given])):
            continue
        try:
            found[node] = trace_axis(node, list(range(val(node).dim() - 1)))
        except GraphoptError:  # one token, or none
            continue
    rows = {node: int(val(arguments(node)["weight"]).shape[0]) for node in found}
    return {node: found[node] for node in sorted(found, key=lambda n: -rows[n])}


def _flows(graph: fx.Graph) -> dict[fx.Node, AxisFlow | None]:
    """Every attention, in order, and the rows of the product that makes its keys, followed."""
    found: dict[fx.Node, AxisFlow | None] = {}
    for node in graph.nodes:
        if node.target is ATTENTION:
            known = [flow for flow in found.values() if flow and _shows(flow, node)]
            found[node] = known[0] if known else _flow(node)
    return found


def _flow(attention: fx.Node) -> AxisFlow | None:
    products = [n for n in ancestors([arguments(attention)["key"]]) if _is_product(n)]
    order = {node: i for i, node in enumerate(attention.graph.nodes)}
    if not products:
        return None
    given = arguments(max(products, key=order.__getitem__))["input"]
    try:
        flow = trace_axis(given, list(range(val(given).dim() - 1)))
    except GraphoptError:  # one row, or none
        return None
    return flow if _shows(flow, attention) else None


def _shows(flow: AxisFlow, attention: fx.Node) -> bool:
    """Whether keys are tokens: each is of one of them, and a token is not spread over heads."""
    key = arguments(attention)["key"]
    places: Sequence[Placement] = flow.places(key)
    rank = val(key).dim()
    return bool(places) and rank - 2 in places[0].dims and not {rank - 1} & {*places[0].dims}


def _leading(attention: fx.Node) -> set[fx.Node]:
    """Products that an attention reads with no other between."""
    given = arguments(attention)
    left = [given[name] for name in ("query", "key", "value")]
    found, seen = set[fx.Node](), set[fx.Node]()
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if _is_product(node):
            found.add(node)
        else:
            left += node.all_input_nodes
    return found


def _is_product(node: fx.Node) -> bool:
    return node.target is aten.linear.default
