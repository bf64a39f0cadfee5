"""Expressions of sums, products and powers, as polynomials in two unknowns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.passes.composites.expressions import number, scaled
from graphopt.program import Program, val
from graphopt.rewrite import arguments

aten = torch.ops.aten

Polynomial = dict[tuple[int, int], float]
"""Powers of the first and the second unknown -> coefficient."""

DEGREE = 8
DEPTH = 10


@dataclass(frozen=True)
class Reading:
    """A polynomial and the operator nodes it was read from."""

    powers: Polynomial
    nodes: tuple[fx.Node, ...] = ()


class Reader:
    """Reads nodes as polynomials in given unknowns; what is none of that reads as ``None``."""

    def __init__(self, program: Program, unknowns: dict[fx.Node, Polynomial]) -> None:
        self.program = program
        self.known: dict[fx.Node, Reading | None] = {n: Reading(p) for n, p in unknowns.items()}

    def read(self, value: object, depth: int = DEPTH) -> Reading | None:
        if not isinstance(value, fx.Node):
            plain = number(self.program, value)
            return None if plain is None else Reading({(0, 0): plain})
        if value not in self.known:
            self.known[value] = self._read(value, depth) if depth else None
        return self.known[value]

    def _read(self, node: fx.Node, depth: int) -> Reading | None:
        if (plain := number(self.program, node)) is not None:
            return Reading({(0, 0): plain})
        if found := scaled(self.program, node):
            inner = self.read(found[0], depth - 1)
            return inner and _noting(node, _times(inner.powers, {(0, 0): found[1]}), inner)
        if node.target is aten.pow.Tensor_Scalar:
            return self._power(node, depth)
        if node.target not in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor):
            return None
        if arguments(node).get("alpha", 1) != 1:
            return None
        a, b = (self.read(v, depth - 1) for v in node.args[:2])
        if a is None or b is None:
            return None
        if node.target is aten.mul.Tensor:
            return _noting(node, _times(a.powers, b.powers), a, b)
        sign = -1.0 if node.target is aten.sub.Tensor else 1.0
        return _noting(node, _plus(a.powers, b.powers, sign), a, b)

    def _power(self, node: fx.Node, depth: int) -> Reading | None:
        exponent = number(self.program, node.args[1])
        inner = self.read(node.args[0], depth - 1)
        if inner is None or exponent not in (1.0, 2.0, 3.0):
            return None
        powers: Polynomial = {(0, 0): 1.0}
        for _ in range(int(exponent)):
            powers = _times(powers, inner.powers)
        return _noting(node, powers, inner)


def _noting(node: fx.Node, powers: Polynomial, *parts: Reading) -> Reading | None:
    """The reading of a node, unless its degree or a change of dtype rules it out."""
    dtypes = {val(n).dtype for p in parts for n in p.nodes} | {val(node).dtype}
    if len(dtypes) > 1 or any(i + j > DEGREE for i, j in powers):
        return None
    inner = dict.fromkeys(n for p in parts for n in p.nodes)
    return Reading(powers, (node, *inner))


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    made: Polynomial = {}
    for (i, j), x in a.items():
        for (k, m), y in b.items():
            made[i + k, j + m] = made.get((i + k, j + m), 0.0) + x * y
    return made


def _plus(a: Polynomial, b: Polynomial, sign: float) -> Polynomial:
    return {p: a.get(p, 0.0) + sign * b.get(p, 0.0) for p in {**a, **b}}


def close(a: Polynomial, b: Polynomial) -> bool:
    """Equal coefficients, to one part in a million."""
    terms = {**a, **b}
    return all(
        math.isclose(a.get(p, 0.0), b.get(p, 0.0), rel_tol=1e-6, abs_tol=1e-12) for p in terms
    )
