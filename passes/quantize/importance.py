"""What rows count in the second moment of a product's inputs: importance of tokens.

Sung et al. 2025, "RSQ: Learning from Important Tokens Leads to Better Quantized LLMs", section 4:
GPTQ minimises ``|(W - Q) X R|^2``, R diagonal, so that its Hessian is ``X R^2 X.T``. Scores s of
the tokens of a sample become ``r = r_min + (1 - r_min) (s - min s) / (max s - min s)``.

* ``"attention"`` (AttnCon): how much attention a token gets, ``s_j = sum over heads m and queries i
  of A[m, i, j]``, in the attention that a product leads to with no other product between, else in
  the last one before it. Which rows are the tokens that are attended to, the axes say.
* ``"norm"`` (ActNorm): the length of the row itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import sympy
import torch
from torch import Tensor, fx

from graphopt.analysis.axes import AxisFlow, bind_sizes, index_map, trace_axis
from graphopt.analysis.axis_rules.placement import Placement
from graphopt.analysis.flow import ancestors
from graphopt.calibration import Stream
from graphopt.errors import GraphoptError
from graphopt.program import Program, val
from graphopt.rewrite import arguments

Kind = Literal["attention", "norm"]
KINDS = get_args(Kind)
LEAST = 0.01
"""What the least important row of a sample counts, the most important being 1: r_min."""
QUERIES = 256
"""Rows of an attention matrix that are held at a time."""

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


class Link(NamedTuple):
    """A product's rows as the tokens that an attention looks at."""

    attention: fx.Node
    flow: AxisFlow


class Importance:
    """Squares of r for the rows that products are given.

    Attributes:
        links: by product, where its importance comes from.
        unknown: products all of whose rows count the same, and why.
        received: by attention and sample, what each token gets of it.
    """

    def __init__(
        self,
        program: Program,
        samples: Sequence[Sequence[Any]],
        products: Iterable[fx.Node],
        kind: Kind | None,
    ) -> None:
        self.kind, self.links, self.unknown = kind, dict[fx.Node, Link](), dict[fx.Node, str]()
        self.received: dict[fx.Node, list[Tensor]] = {}
        self.sizes: list[dict[sympy.Symbol, int]] = []
        if kind == "attention":
            self.sizes = [_sizes(program, sample) for sample in samples]
            flows = _flows(program.graph)
            for product in products:
                self._link(product, flows)

    @property
    def attentions(self) -> list[fx.Node]:
        """Those that are looked at."""
        return list(dict.fromkeys(link.attention for link in self.links.values()))

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
        flow = next(link.flow for link in self.links.values() if link.attention is attention)
        rows = [dict(zip(columns, row, strict=True)) for row in _rows(columns)]
        self.received[attention] = [
            _by_token(attention, flow, {**given, **row}, sizes)
            for row, sizes in zip(rows, self.sizes, strict=True)
        ]

    def miss(self, attention: fx.Node) -> None:
        """Samples went past an attention before anybody looked."""
        for product in [n for n, link in self.links.items() if link.attention is attention]:
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
        return self._attended(product, samples)

    def keep(self, products: Iterable[fx.Node]) -> None:
        """Forget what none of these products needs."""
        wanted = {self.links[n].attention for n in products if n in self.links}
        self.received = {n: gets for n, gets in self.received.items() if n in wanted}

    def _attended(self, product: fx.Node, samples: Iterable[Tensor]) -> Iterator[Tensor]:
        attention, flow = self.links[product]
        node = arguments(product)["input"]
        for x, scores, sizes in zip(samples, self.received[attention], self.sizes, strict=True):
            tokens = _tokens(flow, node, sizes, x.dim()).to(x.device).expand(x.shape[:-1])
            known = (tokens >= 0) & (tokens < len(scores))
            made = scaled(scores)[tokens.clamp(0, len(scores) - 1)]
            yield torch.where(known, made, LEAST).square()


def scaled(scores: Tensor) -> Tensor:
    """Scores of the rows of a sample as r, between `LEAST` and 1; 1 where all are the same."""
    if not scores.numel():
        return scores
    low, high = scores.amin(), scores.amax()
    if not high > low:
        return torch.ones_like(scores)
    return LEAST + (1 - LEAST) * (scores - low) / (high - low)


def received(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """What each key gets of attention, summed over queries ``(..., L, E)``.

    Returns:
        ``(..., S)``, float32, with the heads of the queries; a row that sees nothing gives nothing.
    """
    query, key = query.float(), key.float()
    if key.dim() > 2 and key.shape[-3] not in (1, query.shape[-3]):
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)  # grouped heads
    places = torch.arange(key.shape[-2], device=key.device)
    total: Tensor | float = 0.0
    for start in range(0, query.shape[-2], QUERIES):
        part = query[..., start : start + QUERIES, :]
        logits = part @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            rows = attn_mask.shape[-2] > 1
            mask = attn_mask[..., start : start + QUERIES, :] if rows else attn_mask
            bias = mask.to(logits.dtype)
            logits = (
                logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + bias
            )
        if is_causal:
            last = torch.arange(start, start + part.shape[-2], device=key.device)[:, None]
            logits = logits.masked_fill(places > last, -torch.inf)
        total = total + logits.softmax(-1).nan_to_num(0.0).sum(-2)
    assert isinstance(total, Tensor)  # there is a query
    return total


def _by_token(
    attention: fx.Node, flow: AxisFlow, given: Mapping[str, Any], sizes: Mapping[sympy.Symbol, int]
) -> Tensor:
    """What each token of a sample gets of an attention."""
    key = given["key"]
    gets = received(given["query"], key, given["attn_mask"], given["is_causal"], given["scale"])
    tokens = _tokens(flow, arguments(attention)["key"], sizes, key.dim())
    tokens = tokens.to(gets.device).expand(gets.shape).flatten()
    count = int(sympy.sympify(flow.extent).subs(sizes))
    known = (tokens >= 0) & (tokens < count)
    return gets.new_zeros(count).index_add(0, tokens[known], gets.flatten()[known])


def _tokens(flow: AxisFlow, node: fx.Node, sizes: Mapping[sympy.Symbol, int], rank: int) -> Tensor:
    """The token that each position of a tensor holds, without its last dim."""
    return index_map(flow.places(node)[0].at(sizes), rank)[..., 0]


def _rows(columns: Mapping[str, Iterator[Any]]) -> Iterator[tuple[Any, ...]]:
    return zip(*columns.values(), strict=True)


def _sizes(program: Program, sample: Sequence[Any]) -> dict[sympy.Symbol, int]:
    """What symbols of sizes stand for."""
    found: dict[sympy.Symbol, int] = {}
    for node, value in zip(program.user_inputs(), sample, strict=True):
        fake = val(node)
        if isinstance(fake, Tensor) and isinstance(value, Tensor):
            found |= bind_sizes(fake, value)
    return found


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
