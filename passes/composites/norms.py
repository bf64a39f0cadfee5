"""RMSNorm and LayerNorm written out by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.canonicalize.identity import same_sizes
from graphopt.passes.composites import norm_examples as cases
from graphopt.passes.composites.expressions import CASTS, is_call
from graphopt.passes.composites.normalised import ROOTS, Normalised, by_variance, read_normalised
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Pass, Profit, Refusal, Rule

aten = torch.ops.aten


@dataclass(frozen=True)
class Affine:
    """Scale and shift after a normalisation; ``nodes`` apply them, the last one first."""

    weight: fx.Node | None = None
    bias: fx.Node | None = None
    nodes: tuple[fx.Node, ...] = ()


class _Norm(Rule):
    """What both norms share: from a root of a mean of squares to the normalised value."""

    profit = Profit.ALWAYS
    centred = False

    def find(self, program: Program) -> Iterator[Candidate]:
        for node in program.graph.nodes:
            if node.target not in ROOTS:
                continue
            found = read_normalised(program, node)
            if isinstance(found, Normalised) and found.centred is self.centred:
                yield Candidate(self._match(program, found))
            elif isinstance(found, Refusal) and by_variance(node) is self.centred:
                yield Candidate(Match(program, (node,), (node,), {"problem": found}))

    def _match(self, program: Program, found: Normalised) -> Match:
        affine = read_affine(found.node, found.axes, shift=self.centred)
        nodes = dict.fromkeys((*affine.nodes, *found.nodes))
        bound: dict[str, Any] = {"x": found.x, "eps": found.eps, "axes": found.axes}
        bound |= {"weight": affine.weight, "bias": affine.bias}
        return Match(program, (next(iter(nodes)),), tuple(nodes), bound)

    def check(self, match: Match) -> Refusal | None:
        if "problem" in match:
            return match["problem"]
        x = match.val("x")
        sizes = x.shape[x.dim() - match["axes"] :]
        if not all(isinstance(s, int) for s in sizes):
            return Refusal("the extent of the normalised axis is dynamic", match["x"])
        return self._refuse_half(match, x)

    def _refuse_half(self, match: Match, x: Tensor) -> Refusal | None:  # noqa: ARG002
        return None

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)


class RecognizeRMSNorm(_Norm):
    """``x / sqrt(mean(x^2) + eps) * w = rms_norm(x, w, eps)``.

    Zhang and Sennrich 2019, equation 4. A weight applied after a cast (Llama) is applied in that
    dtype, one before it (Gemma's ``1 + w``) in float32, as it was.
    """

    benefit = 4

    def _refuse_half(self, match: Match, x: Tensor) -> Refusal | None:
        if x.dtype.itemsize < 4 and x.device.type == "cpu" and not _upcasts(match):
            reason = f"the norm is computed in {x.dtype}: rms_norm would use float32, slower on CPU"
            return Refusal(reason, match["x"])
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        shape = list(match.val("x").shape[match.val("x").dim() - match["axes"] :])
        return build(aten.rms_norm.default, match["x"], shape, match["weight"], match["eps"])

    def examples(self) -> Iterable[Example]:
        return cases.rms_examples()

    def near_misses(self) -> Iterable[Example]:
        return cases.rms_near_misses()


class RecognizeLayerNorm(_Norm):
    """``(x - mean x) / sqrt(var x + eps) * w + b = layer_norm(x, w, b, eps)``.

    Ba, Kiros and Hinton 2016, equation 3; the variance is the biased one.
    """

    benefit = 5
    centred = True

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        shape = list(match.val("x").shape[match.val("x").dim() - match["axes"] :])
        given = (match["x"], shape, match["weight"], match["bias"], match["eps"])
        return build(aten.layer_norm.default, *given)

    def examples(self) -> Iterable[Example]:
        return cases.layer_examples()

    def near_misses(self) -> Iterable[Example]:
        return cases.layer_near_misses()


def read_affine(node: fx.Node, axes: int, *, shift: bool) -> Affine:
    """The scale (and shift) that is all that happens to a normalised value."""
    weight, scaled_by = _applied(node, aten.mul.Tensor, axes)
    if weight is None:
        return Affine()
    bias, shifted_by = _applied(scaled_by, aten.add.Tensor, axes) if shift else (None, None)
    nodes = tuple(n for n in (shifted_by, scaled_by) if n is not None)
    return Affine(weight, bias if shifted_by else None, nodes)


def _applied(node: fx.Node | None, target: Any, axes: int) -> tuple[fx.Node | None, fx.Node | None]:
    """The vector that the value's only user multiplies or adds, and that user."""
    user = next(iter(node.users)) if node is not None and len(node.users) == 1 else None
    if node is None or not is_call(user, target) or user is None:
        return None, None
    if len(user.args) != 2 or user.kwargs:
        return None, None
    other = user.args[1] if user.args[0] is node else user.args[0]
    x, vector = val(node), val(other)
    fits = isinstance(vector, Tensor) and vector.dtype == x.dtype and other is not node
    if fits and same_sizes(vector.shape, x.shape[x.dim() - axes :]):
        return other, user
    return None, None


def _upcasts(match: Match) -> bool:
    """Whether the original computed in a wider dtype than it was given."""
    return any(is_call(n, *CASTS) for n in match.nodes)
