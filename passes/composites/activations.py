"""Activations written out by hand, read as polynomials in ``x`` and one function of ``x``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.composites.examples import case, half
from graphopt.passes.composites.expressions import is_call, upward
from graphopt.passes.composites.polynomial import Polynomial, Reader, close
from graphopt.program import Program, operator_name, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Pass, Profit, Refusal, Rule

aten = torch.ops.aten

X: Polynomial = {(1, 0): 1.0}


@dataclass(frozen=True)
class Spelling:
    """An activation: ``result(x, t)`` with ``t = function(inner(x))``, by powers of ``x, t``."""

    function: Any
    inner: Polynomial
    result: Polynomial


class Activation(Rule):
    """``f(x)`` written with elementary functions is one operator."""

    profit = Profit.ALWAYS
    benefit = 3
    spellings: ClassVar[tuple[Spelling, ...]] = ()
    depth: ClassVar[int] = 8

    def find(self, program: Program) -> Iterator[Candidate]:
        for spelling in self.spellings:
            for node in program.graph.find_nodes(op="call_function", target=spelling.function):
                yield from self._at(program, node, spelling)

    def _at(self, program: Program, node: fx.Node, spelling: Spelling) -> Iterator[Candidate]:
        for x in dict.fromkeys(upward(node.args[0], 6)):
            inner = Reader(program, {x: X}).read(node.args[0]) if _is_floating(x) else None
            if inner is None or not inner.powers.keys() <= {(i, 0) for i in range(9)}:
                continue
            if close(inner.powers, spelling.inner):
                found = self._climb(program, x, node, inner.nodes, spelling)
                if found is not None:
                    yield Candidate(found)
                    return
            elif refusal := self.look_alike(node, x, inner.powers):
                yield Candidate(Match(program, (node,), (node,), {"problem": refusal}))
                return

    def _climb(
        self, program: Program, x: fx.Node, atom: fx.Node, inner: Any, spelling: Spelling
    ) -> Match | None:
        """Follow users of the function until they amount to the result."""
        reader = Reader(program, {x: X, atom: {(0, 1): 1.0}})
        node: fx.Node | None = atom
        for _ in range(self.depth):
            node = _next(node, reader)
            if node is None:
                return None
            found = reader.read(node)
            if found is not None and close(found.powers, spelling.result):
                nodes = dict.fromkeys((node, *found.nodes, atom, *inner))
                return Match(program, (node,), tuple(nodes), {"x": x})
        return None

    def look_alike(self, node: fx.Node, x: fx.Node, inner: Polynomial) -> Refusal | None:  # noqa: ARG002
        """A reason to report for an argument that is nearly the wanted one."""
        return None

    def check(self, match: Match) -> Refusal | None:
        return match.get("problem")

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)


def _next(node: fx.Node | None, reader: Reader) -> fx.Node | None:
    """The first user that is still a polynomial in ``x`` and the function."""
    users = list(node.users) if node is not None else []
    return next((u for u in users if reader.read(u) is not None), None)


def _is_floating(node: fx.Node) -> bool:
    value = val(node)
    return isinstance(value, Tensor) and value.dtype.is_floating_point


class RecognizeGelu(Activation):
    """``x/2 (1 + erf(x/sqrt 2)) = gelu(x)``, and its tanh approximation.

    Hendrycks and Gimpel 2016, section 2: ``x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``.
    """

    spellings = (
        Spelling(aten.erf.default, {(1, 0): math.sqrt(0.5)}, {(1, 0): 0.5, (1, 1): 0.5}),
        Spelling(
            aten.tanh.default,
            {(1, 0): math.sqrt(2 / math.pi), (3, 0): 0.044715 * math.sqrt(2 / math.pi)},
            {(1, 0): 0.5, (1, 1): 0.5},
        ),
    )

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        by_tanh = any(is_call(n, aten.tanh.default) for n in match.nodes)
        return build(aten.gelu.default, match["x"], approximate="tanh" if by_tanh else "none")

    def look_alike(self, node: fx.Node, x: fx.Node, inner: Polynomial) -> Refusal | None:  # noqa: ARG002
        cubic = inner.keys() == {(1, 0), (3, 0)} and is_call(node, aten.tanh.default)
        linear = inner.keys() == {(1, 0)} and is_call(node, aten.erf.default)
        near = linear and math.isclose(inner[1, 0], math.sqrt(0.5), rel_tol=0.05)
        if not cubic and not near:
            return None
        shown = " + ".join(f"{c:g} x^{p[0]}" for p, c in sorted(inner.items()))
        return Refusal(f"{operator_name(node.target)} of {shown} is not that of gelu", node)

    def examples(self) -> Iterable[Example]:
        yield case("erf", lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))))
        yield case(
            "erf, training", lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5)), training=True
        )
        yield case("erf, other order", lambda x: 0.5 * ((x * 0.7071067811865476).erf() + 1) * x)
        yield case(
            "erf, distributed", lambda x: 0.5 * x + x * 0.5 * torch.erf(x / 1.4142135623730951)
        )
        yield case("tanh, power", by_tanh)
        yield case("tanh, products", _by_products)
        yield case("tanh, training", by_tanh, training=True)
        yield case("of a product", lambda x: by_tanh(x * 3.0) + x)
        yield case("bfloat16", by_tanh, half(2, 5, 8))

    def near_misses(self) -> Iterable[Example]:
        yield case(
            "other cube",
            lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3))),
            reason="not that",
        )
        yield case(
            "rounded root", lambda x: x * 0.5 * (1 + torch.erf(x / 1.4)), reason="not that of gelu"
        )
        yield case("other factor", lambda x: x * (1 + torch.erf(x / math.sqrt(2.0))))
        yield case(
            "two tensors",
            lambda x, y: y * 0.5 * (1 + torch.erf(x / math.sqrt(2.0))),
            *((2, 8),) * 2,
        )
        yield case("erf used", _erf_used, reason="also used by")
        yield case("integers", lambda x: torch.erf(x / math.sqrt(2.0)) * x, lambda: torch.arange(6))


class RecognizeSilu(Activation):
    """``x sigmoid(x) = silu(x)``. Elfwing, Uchibe and Doya 2017, equation 2."""

    spellings = (Spelling(aten.sigmoid.default, X, {(1, 1): 1.0}),)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        return build(aten.silu.default, match["x"])

    def look_alike(self, node: fx.Node, x: fx.Node, inner: Polynomial) -> Refusal | None:
        product = any(is_call(u, aten.mul.Tensor) and x in u.args for u in node.users)
        if product and inner.keys() == {(1, 0)}:
            return Refusal(f"the sigmoid is of {inner[1, 0]:g} x, not of x", node)
        return None

    def examples(self) -> Iterable[Example]:
        yield case("method", lambda x: x * x.sigmoid())
        yield case("swapped", lambda x: torch.sigmoid(x) * x)
        yield case("gate", lambda x, y: x * torch.sigmoid(x) * y, *((2, 5, 8),) * 2)
        yield case("training", lambda x: (y := x + 1) * torch.sigmoid(y), training=True)

    def near_misses(self) -> Iterable[Example]:
        yield case("quick gelu", lambda x: x * torch.sigmoid(1.702 * x), reason="of 1.702 x")
        yield case("gate alone", lambda x, y: y * torch.sigmoid(x), *((2, 5, 8),) * 2)
        yield case("sigmoid returned", lambda x: ((s := torch.sigmoid(x)) * x, s), reason="output")
        yield case("written in place", lambda x: torch.sigmoid(x).mul_(x + 1))


class RecognizeHardswish(Activation):
    """``x relu6(x + 3) / 6 = hardswish(x)``. Howard et al. 2019, section 5.2."""

    spellings = (Spelling(aten.relu6.default, {(1, 0): 1.0, (0, 0): 3.0}, {(1, 1): 1 / 6}),)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        return build(aten.hardswish.default, match["x"])

    def examples(self) -> Iterable[Example]:
        yield case("relu6", lambda x: x * F.relu6(x + 3) / 6)
        yield case("scaled first", lambda x: F.relu6(x + 3.0) * (1 / 6) * x, training=True)

    def near_misses(self) -> Iterable[Example]:
        yield case("other offset", lambda x: x * F.relu6(x + 2) / 6)
        yield case("used again", _relu_used, reason="also used by")


def by_tanh(x: Tensor) -> Tensor:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def _by_products(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x)))


def _erf_used(x: Tensor) -> Tensor:
    erf = torch.erf(x / math.sqrt(2.0))
    return x * 0.5 * (1.0 + erf) + erf.mean()


def _relu_used(x: Tensor) -> Tensor:
    gate = F.relu6(x + 3)
    return x * gate / 6 + gate.mean()
