"""Many matrices in one tensor, each with rows of its own: experts, and batched products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.kernels.quantized.weight import OPERANDS
from graphopt.passes.quantize import expert_examples, sharing
from graphopt.passes.quantize.arrange import arranged, restored
from graphopt.passes.quantize.forms import Form, form_of, held, is_batched, products
from graphopt.passes.quantize.linear import QuantizeLinear
from graphopt.passes.quantize.refusals import FLOATS, numbers_refusal
from graphopt.passes.quantize.views import constants, place, viewed
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Refusal, arguments

aten = torch.ops.aten


class QuantizeExperts(QuantizeLinear):
    """``x_e @ W_e.T = quantized_experts(x, Q(W))`` for the rows ``x_e`` of each expert e.

    Grouped products of mixtures of experts, whose rows are sorted by expert, and batched products
    with a constant ``(E, N, K)``. Each output channel of each expert has scales of its own.
    """

    def candidates(self, program: Program) -> Iterator[Candidate]:
        if not program.frozen:
            return
        for weight, sides in products(program).by_weight.items():
            if is_batched(program, sides):
                nodes = tuple(sides)
                yield Candidate(Match(program, nodes, nodes, {"weight": weight, "sides": sides}))
        known = constants(program)
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in filter(is_grouped, program.graph.nodes):
            if node.args[1] in known:
                seen = viewed(program, node.args[1])
                groups.setdefault(seen[0] if seen else node.args[1], []).append(node)
        for weight, calls in groups.items():
            nodes = tuple(calls)
            yield Candidate(Match(program, nodes, nodes, {"weight": weight, "sides": None}))

    def check(self, match: Match) -> Refusal | None:
        weight = match["weight"]
        if weight.op != "placeholder":
            reason = f"`{weight.name}` computes the weights from constants, and was not folded"
            return Refusal(reason, weight)
        if (found := self.settings.refusal(match.program, weight)) is not None:
            return found
        if (found := sharing.out_of_scope(match, self.scope)) is not None:
            return found
        read = [_matrices(match, node) for node in match.nodes]
        for matrices in read:
            if isinstance(matrices, Refusal):
                return matrices
        distinct = {place(m): m for m in read if isinstance(m, Tensor)}
        if held(match, distinct, shared=False) > val(weight).numel():
            reason = "is read in several ways: quantized, its numbers would be held twice"
            return Refusal(f"`{weight.name}` {reason}", weight)
        flat = (m.reshape(-1, m.shape[-1]) for m in distinct.values())
        refusals = (numbers_refusal(m, self.settings.scheme, weight) for m in flat)
        return next(filter(None, refusals), None)

    def matrices(self, match: Match) -> list[Tensor]:
        read = (_matrices(match, node) for node in match.nodes)
        distinct = {place(m): m for m in read if isinstance(m, Tensor)}
        return [m.reshape(-1, m.shape[-1]) for m in distinct.values()]

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        weight, made = match["weight"], {}
        match.program.tensor(weight)  # relied on
        results = []
        for node in match.nodes:
            matrices = _matrices(match, node)
            assert isinstance(matrices, Tensor)  # `check` has seen it
            if place(matrices) not in made:
                rows = matrices.reshape(-1, matrices.shape[-1])
                made[place(matrices)] = self.stored(weight, rows, build)
            build.anchor = node
            results.append(self._product(match, node, made[place(matrices)], matrices, build))
        return tuple(results)

    def _product(
        self,
        match: Match,
        node: fx.Node,
        held: dict[str, fx.Node],
        matrices: Tensor,
        build: Builder,
    ) -> fx.Node:
        if match["sides"] is None:
            given: Any = node.args
            return self._experts(given[0], given[2], held, matrices, build)
        form = form_of(match.program, node, match["sides"][node])
        assert isinstance(form, Form)  # `check` has seen it
        lead = len(form.axes.batch) + len(form.axes.rows)
        x = arranged(build, form.read, form.side, form.axes, matrices.shape[-1])
        sizes = [build.size(x, dim) for dim in range(lead)]
        rows = build(aten.reshape.default, x, [-1, matrices.shape[-1]])
        made = self._experts(rows, None, held, matrices, build)
        made = build(aten.reshape.default, made, [*sizes, matrices.shape[-2]])
        return restored(build, made, form.read, form.axes)

    def _experts(
        self,
        rows: fx.Node,
        offsets: fx.Node | None,
        held: dict[str, fx.Node],
        matrices: Tensor,
        build: Builder,
    ) -> fx.Node:
        made: fx.Node = build(
            torch.ops.graphopt.quantized_experts.default,
            rows,
            offsets,
            *map(held.get, OPERANDS),
            matrices.shape[0],
            *self.settings.scheme.arguments,
            self.settings.by_rows,
        )
        return made

    def _unknown(self, match: Match) -> str:  # noqa: ARG002
        is_static = self.settings.activations == "static"
        return "rows of experts have scales of their own" if is_static else ""

    def examples(self) -> Iterable[Example]:
        return expert_examples.examples()

    def near_misses(self) -> Iterable[Example]:
        return expert_examples.near_misses()


def is_grouped(node: fx.Node) -> bool:
    """Whether a node multiplies rows sorted by expert: torch's operator, or that of transformers
    for what torch's does not take."""
    namespace, name = (getattr(node.target, k, "") for k in ("namespace", "_opname"))
    return (namespace, name) in (("aten", "_grouped_mm"), ("transformers", "grouped_mm_fallback"))


def _matrices(match: Match, node: fx.Node) -> Tensor | Refusal:
    """The weight as ``(E, N, K)``, a view of it."""
    if match["sides"] is not None:
        form = form_of(match.program, node, match["sides"][node])
        if isinstance(form, Refusal):
            return form
        plain = [len(form.axes.batch), len(form.axes.columns), len(form.axes.inner)] == [1, 1, 1]
        return form.matrix if plain else Refusal("a product over several axes of each kind", node)
    found = viewed(match.program, node.args[1])  # type: ignore[arg-type]
    assert found is not None  # `find` has seen it
    given, x = arguments(node), val(node.args[0])
    if x.dim() != 2 or found[1].dim() != 3 or given.get("offs", given.get("offsets")) is None:
        return Refusal("rows of experts are a matrix, and their weights three axes", node)
    if given.get("bias") is not None or val(node).dtype != x.dtype or x.dtype not in FLOATS:
        return Refusal("the grouped product has a bias, or another dtype than its input", node)
    return found[1].mT
