"""Embeddings that no product shares, quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.passes.quantize.cases import Function, Model
from graphopt.passes.quantize.linear import QuantizeLinear
from graphopt.passes.quantize.names import USUAL, Scope
from graphopt.passes.quantize.plan import Plan, Settings
from graphopt.passes.quantize.refusals import readers
from graphopt.passes.quantize.sharing import EMBEDDINGS
from graphopt.program import Program
from graphopt.rewrite import Candidate, Example, Match, Refusal

aten = torch.ops.aten


class QuantizeEmbedding(QuantizeLinear):
    """``embedding(W, i) = quantized_embedding(Q(W), i)`` but for the rounding of ``Q``.

    Each row has scales of its own (Guan et al. 2019, "Post-training 4-bit quantization on embedding
    tables", section 3). Look-ups that share their weight with products belong to those.
    """

    def __init__(self, settings: Settings, plan: Plan, scope: Scope = USUAL) -> None:
        super().__init__(replace(settings, activations="none"), plan, scope)
        self.kind = settings.kind

    def candidates(self, program: Program) -> Iterator[Candidate]:
        shared = readers(program, aten.linear.default)
        for weight, nodes in readers(program, aten.embedding.default).items():
            if weight not in shared:
                yield Candidate(Match(program, tuple(nodes), tuple(nodes), {"weight": weight}))
        for weight, nodes in readers(program, aten.embedding_bag.padding_idx).items():
            yield Candidate(Match(program, tuple(nodes), tuple(nodes), {"weight": weight}))

    def check(self, match: Match) -> Refusal | None:
        if match.root.target is not aten.embedding.default:
            reason = "sums up what it looks up: no operator does that with a quantized table"
            return Refusal(f"`{match.root.name}` {reason}", match.root)
        if (found := super().check(match)) is not None or self.scope.embeddings:
            return found
        reason = f"`{match.root.name}` looks rows up: tables are quantized where that is asked for"
        return Refusal(reason, match.root, f"QuantizeMatmul:{EMBEDDINGS}")

    def examples(self) -> Iterable[Example]:
        if not self.scope.embeddings:
            return
        dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
        yield _case("plain", lambda m, i: m.words(i).sin())
        yield _case("returned", lambda m, i: m.words(i))
        yield _case("padding", lambda m, i: F.embedding(i, m.words.weight, 3).sin())
        yield _case(
            "of frequency", lambda m, i: F.embedding(i, m.words.weight, None, None, 2, True)
        )
        yield _case("twice", lambda m, i: m.words(i) * m.words(i.flip(0)))
        yield _case("dynamic", lambda m, i: m.words(i).sin(), dynamic_shapes=dynamic)
        yield _case("short indices", lambda m, i: m.words(i.int()).sin())
        yield _case("one", lambda m, i: m.words(i[0, 0]).sin())
        yield _case("none", lambda m, i: m.words(i[:0]).sin().sum() + i)
        yield _case("bfloat16", lambda m, i: m.words(i).sin(), torch.bfloat16)
        yield _case("float16", lambda m, i: m.words(i).sin(), torch.float16)
        yield _case("written", lambda m, i: m.words(i).mul_(2.0))

    def near_misses(self) -> Iterable[Example]:
        if not self.scope.embeddings:
            yield _case("not asked for", lambda m, i: m.words(i), reason="that is asked for")
        held = "held twice"
        yield _case("summed", lambda m, i: m.words(i) + m.words.weight.sum(), reason=held)
        yield _case("in bags", _bags, reason="sums up what it looks up")
        yield _case("training", lambda m, i: m.words(i), training=True, reason="model trains")
        yield _case("wide", lambda m, i: m.words(i), torch.float64, reason="float64")
        yield _case("no weight", lambda _, i: F.embedding(i, i.new_ones(40, 8) * 1.5))
        yield _case("bounded norm", _bounded)
        yield _case("updated", _updated, reason="the model writes")


def _held() -> dict[str, nn.Module | Tensor]:
    """Tables of 40 words."""
    return {"words": nn.Embedding(40, 64), "table": nn.Buffer(torch.randn(40, 64))}


def _case(
    name: str, function: Function, kind: torch.dtype = torch.float32, **options: Any
) -> Example:
    return Example(
        name,
        lambda: Model(_held(), function).to(kind),
        lambda: (torch.randint(40, (3, 5)),),
        **options,
    )


def _bags(module: Any, indices: Tensor) -> Tensor:
    return F.embedding_bag(indices, module.words.weight)


def _bounded(module: Any, indices: Tensor) -> Tensor:
    return F.embedding(indices, module.table.clone(), max_norm=1.0)


def _updated(module: Any, indices: Tensor) -> Tensor:
    found = F.embedding(indices, module.table).sin()
    module.table.mul_(0.5)
    return found
