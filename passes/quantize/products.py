"""Products with a weight, however they are written, as ``linear``, where that will be quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.quantize import product_examples, sharing
from graphopt.passes.quantize.arrange import (
    arranged,
    as_bias,
    restored,
)
from graphopt.passes.quantize.forms import Form, form_of, held, is_batched, products
from graphopt.passes.quantize.names import USUAL, Scope
from graphopt.passes.quantize.plan import Settings
from graphopt.passes.quantize.refusals import numbers_refusal
from graphopt.passes.quantize.stage import Stage
from graphopt.passes.quantize.views import place
from graphopt.program import Program, val
from graphopt.rewrite import (
    Builder,
    Candidate,
    Example,
    Match,
    Pass,
    Profit,
    Refusal,
    Rule,
)

aten = torch.ops.aten


class SpellProduct(Rule):
    """``sum(x * W) = permute(linear(permute(x), permute(W)))``, for any product of two matrices.

    Weights on the left, transposed, sliced out of a larger one, or with axes that a product
    flattens become matrices ``(N, K)``, which take the place of the weight. All products on one
    weight are spelled together: it must not be held twice. Only what can be quantized is touched.
    """

    profit = Profit.ALWAYS
    apart = True
    benefit = 2

    def __init__(self, settings: Settings, scope: Scope = USUAL) -> None:
        self.settings, self.scope = settings, scope

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)

    def find(self, program: Program) -> Iterator[Candidate]:
        if not program.frozen:
            return
        found = products(program)
        for weight, sides in found.by_weight.items():
            if not is_batched(program, sides):
                nodes = tuple(sides)
                yield Candidate(Match(program, nodes, nodes, {"weight": weight, "sides": sides}))
        for node, reason in found.unread.items():
            yield Candidate(Match(program, (node,), (node,), {"reason": reason}))

    def check(self, match: Match) -> Refusal | None:
        if "reason" in match:
            return Refusal(match["reason"], match.root)
        unformatted = self.settings.refusal(match.program, match["weight"])
        refusal = unformatted or sharing.out_of_scope(match, self.scope)
        return refusal or self._form_refusal(match)

    def _form_refusal(self, match: Match) -> Refusal | None:
        scheme = self.settings.at(match.program, match["weight"]).scheme
        forms = [form_of(match.program, n, side) for n, side in match["sides"].items()]
        for form in forms:
            if isinstance(form, Refusal):
                return form
            if (found := numbers_refusal(form.numbers, scheme, match["weight"])) is not None:
                return found
        distinct = {place(f.matrix): f.matrix for f in forms if isinstance(f, Form)}
        if held(match, distinct) <= val(match["weight"]).numel():
            return None
        reason = "is read in several ways: quantized, its numbers would be held twice"
        return Refusal(f"`{match['weight'].name}` {reason}", match["weight"])

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        weight = match["weight"]
        made = {place(match.program.tensor(weight)): weight}
        return tuple(
            self._linear(form, weight, made, build)
            for node, side in match["sides"].items()
            if isinstance(form := form_of(match.program, node, side), Form)
        )

    def _linear(
        self, form: Form, weight: fx.Node, made: dict[Any, fx.Node], build: Builder
    ) -> fx.Node:
        """The product; ``made`` has the matrices so far, by where their numbers lie."""
        read, axes = form.read, form.axes
        build.anchor = read.node
        own = place(form.matrix)
        if own not in made or form.matrix.dim() != 2:
            name = f"{build.program.target_of(weight)}_folded"
            made[own] = build.state(name, form.numbers.clone(), (weight,))
        bias = as_bias(read, axes)
        x = arranged(build, read, form.side, axes, form.numbers.shape[-1])
        product = build(aten.linear.default, x, made[own], bias)
        rest = read if bias is None else replace(read, summand=None)
        return restored(build, product, rest, axes)

    def examples(self) -> Iterable[Example]:
        return product_examples.examples()

    def near_misses(self) -> Iterable[Example]:
        return product_examples.near_misses()


@dataclass(frozen=True)
class SpellProducts(Stage):
    """The first stage of QuantizeMatmul: products that will be quantized, as ``linear``."""

    settings: Settings
    scope: Scope = USUAL

    def rules(self) -> Sequence[Rule]:
        return (SpellProduct(self.settings, self.scope),)
