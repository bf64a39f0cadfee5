"""Keys and values repeated for each group of heads are read by attention where they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphopt.passes.canonicalize import Canonicalize
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Pass, Refusal, Rule, arguments

aten = torch.ops.aten


class ShareGroupedHeads(Rule):
    """``attention(q, repeat(k), repeat(v)) = attention(q, k, v)`` with grouped heads.

    Head h of the query reads head ``h // n`` of keys and values (Ainslie et al. 2023, GQA, section
    2.2). On a CPU torch's kernel reads them so; the copies that are saved are n times as large as
    the keys and values, which is most of what attention of one new token moves. Other devices have
    no such kernel for every mask.
    """

    def find(self, program: Program) -> Iterator[Candidate]:
        for node in program.graph.find_nodes(
            op="call_function", target=aten.scaled_dot_product_attention.default
        ):
            key, value = (_repeated(node.args[place]) for place in (1, 2))
            if key is None or value is None:
                continue
            through = (*key[1], *value[1])
            bound = {"key": key[0], "value": value[0]}
            nodes = tuple(dict.fromkeys((node, *through)))
            yield Candidate(Match(program, (node,), nodes, bound, frozenset(through)))

    def check(self, match: Match) -> Refusal | None:
        given = arguments(match.root)
        if given["dropout_p"] or given["enable_gqa"]:
            return Refusal("attention drops weights, or has groups of its own", match.root)
        if (device := val(match.root).device.type) != "cpu":
            return Refusal(f"kernels for {device} want keys and values repeated", match.root)
        if val(match["key"]).shape[1] != val(match["value"]).shape[1]:
            return Refusal("keys and values have groups of different sizes", match.root)
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        given = arguments(match.root)
        operands = given["query"], match["key"], match["value"], given["attn_mask"]
        named = {"is_causal": given["is_causal"], "scale": given["scale"], "enable_gqa": True}
        made: fx.Node = build(match.root.target, *operands, **named)
        return made

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)

    def examples(self) -> Iterable[Example]:
        yield _case("keys and values repeated", _Grouped())
        yield _case("under a mask", _Grouped(masked=True))
        yield _case("causal", _Grouped(causal=True))
        yield _case("in training", _Grouped(), training=True)
        dynamic = ({2: "rows"}, {2: "past"}, {2: "past"})
        yield _case("dynamic sizes", _Grouped(masked=True), dynamic_shapes=dynamic)
        yield _case("copies used elsewhere too", _Grouped(shown=True))

    def near_misses(self) -> Iterable[Example]:
        yield _case("heads in turn", _Grouped(order="turns"))
        yield _case("heads in turn, as many as groups", _Grouped(order="turns"), 3, 3)
        yield _case("values alone repeated", _ValuesAlone(), 6)
        yield _case("with dropout", _Grouped(dropout=0.5), training=True, reason="drops weights")


def _repeated(node: object) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """What ``reshape(expand(unsqueeze(x, 2), (B, H, n, S, D)), (B, H n, S, D))`` repeats."""
    if not isinstance(node, fx.Node) or node.target is not aten.reshape.default:
        return None
    wide: fx.Node = node.args[0]  # type: ignore[assignment]
    if wide.target is not aten.expand.default:
        return None
    apart: fx.Node = wide.args[0]  # type: ignore[assignment]
    if apart.target is not aten.unsqueeze.default or val(node).dim() != 4:
        return None
    source: fx.Node = apart.args[0]  # type: ignore[assignment]
    batch, heads, rows, width = val(source).shape
    groups = val(wide).shape[2]
    same = tuple(val(wide).shape) == (batch, heads, groups, rows, width)
    joined = tuple(val(node).shape) == (batch, heads * groups, rows, width)
    if arguments(apart)["dim"] % 5 != 2 or not (same and joined):
        return None
    return source, (node, wide, apart)


class _Grouped(nn.Module):
    def __init__(
        self,
        *,
        masked: bool = False,
        causal: bool = False,
        shown: bool = False,
        order: str = "groups",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.masked, self.causal, self.shown = masked, causal, shown
        self.order, self.dropout = order, dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> object:
        key, value = self._repeat(key), self._repeat(value)
        mask = None
        if self.masked:
            rows, columns = torch.arange(query.shape[2]), torch.arange(key.shape[2])
            mask = columns[None, :] <= rows[:, None] + 2
        made = F.scaled_dot_product_attention(
            query, key, value, mask, self.dropout, is_causal=self.causal
        )
        return (made, key * 2) if self.shown else made

    def _repeat(self, x: Tensor) -> Tensor:
        batch, heads, rows, width = x.shape
        if self.order == "turns":
            return x[:, None].expand(batch, 3, heads, rows, width).reshape(batch, -1, rows, width)
        x = x[:, :, None].expand(batch, heads, 3, rows, width)
        return x.reshape(batch, heads * 3, rows, width)


class _ValuesAlone(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, rows, width = value.shape
        wide = value[:, :, None].expand(batch, heads, 3, rows, width)
        return F.scaled_dot_product_attention(query, key, wide.reshape(batch, -1, rows, width))


def _case(name: str, module: nn.Module, heads: int = 2, values: int = 2, **more: object) -> Example:
    def inputs() -> tuple[Tensor, ...]:
        return (
            torch.randn(2, 3 * values, 5, 8),
            torch.randn(2, heads, 7, 8),
            torch.randn(2, values, 7, 8),
        )

    return Example(name, lambda: module, inputs, **more)  # type: ignore[arg-type]
