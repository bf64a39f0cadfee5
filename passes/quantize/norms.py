"""Scales and shifts of norms, changed as calibration found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.fold_norm_affine import FoldAffine
from graphopt.passes.quantize.cases import Cases
from graphopt.passes.quantize.rotatable import NORMS, folded
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

MOST = 0.1
"""Relative change of what a norm gives that is still a tweak."""
FOLDED = (
    "its scale was folded into the layers that read it, as preset exact does: quantize before "
    "that, passes=['Canonicalize', QuantizeMatmul(...), 'exact']"
)


class Affine(NamedTuple):
    """What takes the place of a norm's scale and shift, in their dtype, and what there is to say of
    it; without a scale, why there is none."""

    note: str
    scale: Tensor | None = None
    shift: Tensor | None = None


class TweakNorm(Rule):
    """``norm(x) * g + b`` becomes ``norm(x) * g' + b'``, g' and b' as calibration found them.

    They make good what quantized weights of the block did to the mean and the variance of its
    output's channels: Li et al. 2023, "Norm Tweaking: High-performance Low-bit Quantization of
    Large Language Models". See `tweaks`. All norms that read one scale are changed together.

    Args:
        found: by the name of the scale.
    """

    profit = Profit.ALWAYS
    numeric = Numeric.LOSSY
    tolerance = MOST
    apart = True

    def __init__(self, found: Mapping[str, Affine]) -> None:
        self.found = found

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)

    def find(self, program: Program) -> Iterator[Candidate]:
        yield from (Candidate(m) for m in norms(program.graph, program) if not _is_changed(m.root))

    def check(self, match: Match) -> Refusal | None:
        if (found := refusal(match)) is not None:
            return found
        affine = self.found.get(name_of(match))
        if affine is None:
            return Refusal("it stands in no block with weights that are quantized", match.root)
        return Refusal(affine.note, match.root) if affine.scale is None else None

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        affine = self.found[name_of(match)]
        assert affine.scale is not None  # of what `check` lets through
        made = {"weight": _replaced(match["scale"], affine.scale, build)}
        if affine.shift is not None:
            made["bias"] = _replaced(match["shift"], affine.shift, build)
        return tuple(_called(node, made, build) for node in match.roots)

    def remark(self, match: Match) -> str:
        return f"`{name_of(match)}`: {self.found[name_of(match)].note}"

    def examples(self) -> Iterable[Example]:
        """For scales that are called ``norm.weight`` and ``rms.weight``."""
        yield _CASES("layer norm", lambda m, x: m.norm(x).sin())
        yield _CASES("rms norm", lambda m, x: m.rms(x).sin())
        yield _CASES("twice", lambda m, x: m.norm(m.norm(x).sin()))
        yield _CASES("returned", lambda m, x: (y := m.norm(x), y + x))
        yield _CASES("half", lambda m, x: m.norm(x).sin(), kind=torch.bfloat16)

    def near_misses(self) -> Iterable[Example]:
        yield _CASES(
            "no scale", lambda _, x: F.layer_norm(x, (8,)).sin(), reason="has no scale that"
        )
        yield _CASES("not calibrated", lambda m, x: m.norm(x), reason="in no block")
        yield _CASES("trains", lambda m, x: m.norm(x), training=True, reason="model trains")
        yield _CASES("read elsewhere", lambda m, x: m.norm(x) + m.norm.weight, reason="read by")
        yield _CASES(
            "computed",
            lambda m, x: F.layer_norm(x, (8,), x[0].exp(), m.norm.bias),
            reason="is computed",
        )
        yield _CASES(
            "shifts apart",
            lambda m, x: m.norm(x) + F.layer_norm(x.sin(), (8,), m.norm.weight),
            reason="shifts of their own",
        )


def norms(graph: fx.Graph, program: Program) -> Iterator[Match]:
    """Norms by the scale that they read, in graph order; those without one by themselves."""
    by_scale: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target in NORMS:
            by_scale.setdefault(arguments(node)["weight"] or node, []).append(node)
    for nodes in by_scale.values():
        given = arguments(nodes[0])
        bound = {"scale": given["weight"], "shift": given.get("bias")}
        yield Match(program, tuple(nodes), tuple(nodes), bound)


def changed(program: Program, found: Mapping[str, Affine]) -> dict[fx.Node, Tensor]:
    """What takes the place of scales and shifts, where something does."""
    made: dict[fx.Node, Tensor] = {}
    for match in norms(program.graph, program):
        affine = found.get(name_of(match)) if match["scale"] is not None else None
        if affine is not None and affine.scale is not None:
            made[match["scale"]] = affine.scale
            if affine.shift is not None:
                made[match["shift"]] = affine.shift
    return made


def name_of(match: Match) -> str:
    """Of the scale."""
    scale: fx.Node = match["scale"]
    return match.program.target_of(scale) or scale.name


def refusal(match: Match) -> Refusal | None:
    """Why scale and shift of norms cannot be others."""
    program, scale, root = match.program, match["scale"], match.root
    if scale is None:
        is_gone = FoldAffine.__name__ in root.meta.get("rewritten_by", ())
        return Refusal(FOLDED if is_gone else "it has no scale that could be changed", root)
    if not program.frozen:
        return Refusal("the model trains: its parameters change", root)
    shifts = [arguments(node).get("bias") for node in match.roots]
    if any(shift is not shifts[0] for shift in shifts):
        return Refusal("norms that share its scale have shifts of their own", root)
    held = [("scale", scale), *([("shift", shifts[0])] if shifts[0] is not None else [])]
    return next(filter(None, (_held_refusal(what, node, match) for what, node in held)), None)


def _held_refusal(what: str, held: fx.Node, match: Match) -> Refusal | None:
    if not match.program.is_constant(held):
        return Refusal(f"its {what} is computed, or written: it is no constant", match.root)
    other = next((user for user in held.users if user not in match.roots), None)
    if other is None:
        return None
    return Refusal(f"its {what} is also read by `{other.name}`, which is not to change", held)


def _is_changed(node: fx.Node) -> bool:
    return TweakNorm.__name__ in node.meta.get("rewritten_by", ())


def _replaced(held: fx.Node, value: Tensor, build: Builder) -> fx.Node:
    """State that takes the place of a vector, and is of no use once that was written."""
    return folded(held, value.to(build.program.tensor(held).dtype), build, "norms")


def _called(node: fx.Node, made: Mapping[str, fx.Node], build: Builder) -> fx.Node:
    build.anchor = node
    new: fx.Node = build(node.target, *({**arguments(node), **made}).values())
    return new


def _held() -> dict[str, nn.Module | Tensor]:
    return {"norm": nn.LayerNorm(8), "rms": nn.RMSNorm(8)}


_CASES = Cases(_held, (4, 8))
