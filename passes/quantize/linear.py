"""``linear`` with a weight of the model, the weight quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.kernels.quantized.static import MIDDLE, Static
from graphopt.kernels.quantized.weight import OPERANDS
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.quantize import embedding, examples, remainder, sharing
from graphopt.passes.quantize.names import USUAL, Scope
from graphopt.passes.quantize.plan import Plan, Settings, rounded
from graphopt.passes.quantize.refusals import constant_refusal, numbers_refusal, readers
from graphopt.program import Program
from graphopt.rewrite import (
    Builder,
    Candidate,
    Example,
    Match,
    Numeric,
    Pass,
    Profit,
    Refusal,
    Rule,
    arguments,
)

aten = torch.ops.aten

ROUNDING = 0.0083
"""Relative RMS error of Gaussian weights rounded to 8 bits per output channel, as measured; a bit
less doubles it."""

SPARE = 2.5
"""Times that error is allowed: channels have outliers, and what is summed up cancels."""

ACTIVATIONS = 0.03
"""Allowed besides for activations in 8 bits, rows by themselves."""

STATIC = 0.06
"""Allowed besides with one scale for all of them: a range of 40 standard deviations comes to 0.045.
"""

SATURATED = (
    "what lies outside of the static range of its inputs saturates: calibrate on inputs like those "
    "at hand, or leave them activations='dynamic'"
)
UNKNOWN = "calibration inputs show no range there, so that rows have scales of their own"


class QuantizeLinear(Rule):
    """``linear(x, W, b) = quantized_linear(x, Q(W), b)`` but for the rounding of ``Q``.

    ``Q`` is what the plan has for a weight, and else rounds it; with activations in 8 bits each row
    of ``x`` has a scale of its own (Yao et al. 2022, ZeroQuant, section 4.1), or all of it has the
    one that calibration inputs called for (Jacob et al. 2018, section 2.1). All that read one
    weight are rewritten together, its look-ups too where embeddings are in scope: a tied head is
    stored once. What the plan has beside ``Q`` is added to the product (see `remainder`). A weight
    with which the error on the inputs at hand is above `tolerance` is kept.
    """

    profit = Profit.ALWAYS
    lift = "QuantizeMatmul:tolerance"
    numeric = Numeric.LOSSY
    folds = False
    apart = True

    def __init__(self, settings: Settings, plan: Plan, scope: Scope = USUAL) -> None:
        self.settings, self.plan, self.scope = settings, plan, scope
        self.kind = settings.kind
        scheme, activations = settings.scheme, settings.activations
        loss = SPARE * ROUNDING * 2 ** (8 - scheme.bits)
        if scheme.dtype != "int" and scheme.bits == 8:
            loss *= 4  # E4M3 has 3 bits behind the point
        allowed = {"dynamic": ACTIVATIONS, "static": STATIC}
        usual = min(0.9, loss + allowed.get(activations, 0.0))
        self.doubt = SATURATED if activations == "static" else ""
        self.tolerance = usual if settings.tolerance is None else settings.tolerance

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)

    def find(self, program: Program) -> Iterator[Candidate]:
        """Candidates whose weights have the format of this rule."""
        layers = self.settings.layers
        for candidate in self.candidates(program):
            match = candidate.match
            if not layers or not match or layers.kind(program, match["weight"]) == self.kind:
                yield candidate

    def candidates(self, program: Program) -> Iterator[Candidate]:
        """Products with weights, in any format."""
        looked_up = readers(program, aten.embedding.default) if self.scope.embeddings else {}
        for weight, products in readers(program, aten.linear.default).items():
            nodes = (*products, *looked_up.get(weight, ()))
            yield Candidate(Match(program, nodes, nodes, {"weight": weight}))

    def check(self, match: Match) -> Refusal | None:
        if (found := self._weight_refusal(match)) is not None:
            return found
        weight = match["weight"]
        return numbers_refusal(match.program.tensor(weight), self.settings.scheme, weight)

    def _weight_refusal(self, match: Match) -> Refusal | None:
        """Why the weight stays as it is, whatever its numbers are."""
        constant = constant_refusal(match.program, match["weight"])
        unformatted = self.settings.refusal(match.program, match["weight"])
        return constant or unformatted or sharing.refusal(match, self.scope)

    def matrices(self, match: Match) -> list[Tensor]:
        """What is stored of a weight that passes `check`: matrices ``(N, K)``."""
        return [match.program.tensor(match["weight"])]

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        weight = match["weight"]
        held = self.stored(weight, match.program.tensor(weight), build)
        beside = self._beside(weight, build)
        pairs = zip(match.nodes, self.activations(match), strict=True)
        return tuple(self._call(node, held, beside, given, build) for node, given in pairs)

    def stored(self, weight: fx.Node, matrix: Tensor, build: Builder) -> dict[str, fx.Node]:
        """A weight, as the matrix ``(N, K)``, in few bits: the state that holds it."""
        name, settings = build.program.target_of(weight) or weight.name, self.settings
        found = self.plan.weights.get(name) or rounded(matrix, settings.scheme, settings.methods)
        tensors = found.tensors.items()
        return {k: build.state(f"{name}_{k}", tensor, (weight,)) for k, tensor in tensors}

    def _beside(self, weight: fx.Node, build: Builder) -> remainder.Held:
        name = build.program.target_of(weight) or weight.name
        apart = self.settings.activations != "none"
        return remainder.hold(self.plan.remainders.get(name, ()), weight, build, apart=apart)

    def activations(self, match: Match) -> list[tuple[Any, ...]]:
        """How each product quantizes what it is given: ``activations`` of its operator, and behind
        a layout the scale and the zero point. Where no range is known, rows have their own."""
        name = match.program.target_of(match["weight"]) or match["weight"].name
        ranges: Sequence[Static | None] = self.plan.inputs.get(name, [None] * len(match.nodes))
        is_static = self.settings.activations == "static"
        return [
            ("static", *static) if is_static and static else (self.settings.by_rows, None, MIDDLE)
            for static in ranges
        ]

    def _call(
        self,
        node: fx.Node,
        held: dict[str, fx.Node],
        beside: remainder.Held,
        activations: tuple[Any, ...],
        build: Builder,
    ) -> fx.Node:
        build.anchor = node
        if node.target is aten.embedding.default:
            return embedding.call(node, held, self.settings.scheme, build)
        given = arguments(node)
        made: fx.Node = build(
            torch.ops.graphopt.quantized_linear.default,
            beside.quantized(given["input"], build),
            *map(held.get, OPERANDS),
            given["bias"],
            *self.settings.scheme.arguments,
            *settings_of(*activations, "plain"),
        )
        return beside.add(made, given["input"], build)

    def remark(self, match: Match) -> str:
        """What a method came to, or where it gave way; the report's row of the weight shows it."""
        note = self._note(match.program.target_of(match["weight"]) or "")
        return "; ".join(filter(None, (note, self._unknown(match))))

    def _unknown(self, match: Match) -> str:
        """What there is to say where static activations are quantized by rows."""
        if self.settings.activations != "static":
            return ""
        products = (n for n in match.nodes if n.target is not aten.embedding.default)
        kinds = zip(products, self.activations(match), strict=False)
        without = [node.name for node, (kind, *_) in kinds if kind != "static"]
        if not without:
            return ""
        named = ", ".join(f"`{name}`" for name in without)
        return f"{named}: {UNKNOWN}"

    def _note(self, name: str) -> str:
        methods = self.settings.methods
        named = [n for n in (*methods.calibrated, *methods.beside) if n != "norms"]
        if name in self.plan.weights or not named:
            return self.plan.notes.get(name, "")
        return f"{' and '.join(named)} calibrates layers of one matrix: it is rounded alone"

    def examples(self) -> Iterable[Example]:
        return examples.examples()

    def near_misses(self) -> Iterable[Example]:
        return examples.near_misses()


def settings_of(activations: str, scale: float | None, zero: int, *layout: str) -> tuple[Any, ...]:
    """The last arguments of an operator; those that only static activations have are left out."""
    return (activations,) if scale is None else (activations, *layout, scale, zero)
