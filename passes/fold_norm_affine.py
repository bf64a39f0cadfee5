"""Scale and bias of a norm folded into the linear layers that read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Pass, Refusal, Rule, arguments

aten = torch.ops.aten

NORMS = (aten.layer_norm.default, aten.rms_norm.default)


class FoldAffine(Rule):
    """``W (gamma * n(x) + beta) + b = (W diag(gamma)) n(x) + (b + W beta)``.

    Applies when every reader of the norm is a linear layer, so that none still needs the scaled
    values; Ashkboos et al. 2024, "SliceGPT", section 3.1, uses the same step.
    """

    def find(self, program: Program) -> Iterator[Candidate]:
        for target in NORMS:
            for norm in program.graph.find_nodes(op="call_function", target=target):
                readers = tuple(norm.users)
                if arguments(norm)["weight"] is None or not any(map(_is_linear, readers)):
                    continue
                linears = tuple(r for r in readers if _reads(r, norm))
                yield Candidate(
                    Match(program, linears or (norm,), (norm, *linears), {"norm": norm})
                )

    def check(self, match: Match) -> Refusal | None:
        norm: fx.Node = match["norm"]
        if not match.program.frozen:
            return Refusal("the model trains: its parameters may not be folded", norm)
        if len(arguments(norm)["normalized_shape"]) != 1:
            return Refusal("the norm runs over several axes", norm)
        return next(filter(None, (_weight_refusal(n, match) for n in match.roots)), None)

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        given = arguments(match["norm"])
        scale, shift = given["weight"], given.get("bias")
        plain = {**given, "weight": None} | ({"bias": None} if "bias" in given else {})
        norm = build(match["norm"].target, *plain.values())
        return tuple(_folded(arguments(n), norm, scale, shift, build) for n in match.roots)

    def examples(self) -> Iterable[Example]:
        yield Example("layer norm", lambda: _Block(_layer_norm(), 1), _input)
        yield Example("rms norm", lambda: _Block(_rms_norm(), 1), _input)
        yield Example("three readers", lambda: _Block(_layer_norm(), 3), _input)
        yield Example("no linear bias", lambda: _Block(_layer_norm(), 2, bias=False), _input)
        yield Example("no norm bias", lambda: _Block(_layer_norm(bias=False), 2), _input)
        axes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
        yield Example("dynamic", lambda: _Block(_layer_norm(), 2), _input, axes)
        yield Example("strided", lambda: _Block(_layer_norm(), 2), _strided)
        yield Example("half", lambda: _Block(_layer_norm(), 2).bfloat16(), _half)

    def near_misses(self) -> Iterable[Example]:
        used, out = "also used by", "also an output of the model"
        yield Example(
            "residual", lambda: _Block(_layer_norm(), 1, residual=True), _input, reason=used
        )
        yield Example(
            "returned", lambda: _Block(_layer_norm(), 1, returned=True), _input, reason=out
        )
        yield Example(
            "tied", lambda: _Block(_layer_norm(), 1, tied=True), _input, reason="also used by"
        )
        yield Example(
            "two axes", lambda: _Block(_layer_norm((6, 8)), 1), _input, reason="several axes"
        )
        yield Example(
            "trains", lambda: _Block(_layer_norm(), 2), _input, training=True, reason="trains"
        )
        yield Example("written", lambda: _Block(_layer_norm(), 1, written=True), _input)
        plain = Example(
            "no affine", lambda: _Block(nn.LayerNorm(8, elementwise_affine=False), 1), _input
        )
        yield plain


def _is_linear(node: fx.Node) -> bool:
    return node.target is aten.linear.default


def _reads(node: fx.Node, norm: fx.Node) -> bool:
    """Whether the node is a linear layer with the norm as its input, and only there."""
    return _is_linear(node) and node.args[0] is norm and norm not in node.args[1:]


def _weight_refusal(linear: fx.Node, match: Match) -> Refusal | None:
    weight = arguments(linear)["weight"]
    if not match.program.is_constant(weight):
        return Refusal("the weight is computed, not a parameter", linear)
    if val(weight).dtype != val(match["norm"]).dtype:
        return Refusal("norm and linear have different dtypes", linear)
    shared = next((u for u in weight.users if u not in match.nodes), None)
    if shared is None:
        return None
    reason = f"the weight is also used by `{shared.name}`: a folded copy would add memory"
    return Refusal(reason, weight)


def _folded(given: dict[str, Any], norm: Any, scale: Any, shift: Any, build: Builder) -> fx.Node:
    weight = build(aten.mul.Tensor, given["weight"], scale)
    bias = given["bias"]
    if shift is not None:
        moved = build(aten.mv.default, given["weight"], shift)
        bias = moved if bias is None else build(aten.add.Tensor, bias, moved)
    made: fx.Node = build(aten.linear.default, norm, weight, bias)
    return made


@dataclass(frozen=True)
class FoldNormAffine(Pass):
    """Fold the scale and bias of LayerNorm and RMSNorm into the linear layers that follow."""

    def rules(self) -> Sequence[Rule]:
        return (FoldAffine(),)


class _Block(nn.Module):
    def __init__(
        self, norm: nn.Module, readers: int, *, bias: bool = True, **variant: bool
    ) -> None:
        super().__init__()
        self.norm, self.variant = norm, variant
        self.readers = nn.ModuleList(nn.Linear(8, 8, bias) for _ in range(readers))

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        out = torch.cat([reader(y).sin() for reader in self.readers], -1)
        if self.variant.get("written"):
            y += 1
            return out + y
        if self.variant.get("tied"):
            return out + self.readers[0](x)
        if self.variant.get("returned"):
            return out, y
        return out + y if self.variant.get("residual") else out


def _layer_norm(shape: Any = 8, bias: bool = True) -> nn.Module:
    return _perturbed(nn.LayerNorm(shape, bias=bias))


def _rms_norm() -> nn.Module:
    return _perturbed(nn.RMSNorm(8, eps=1e-6))


def _perturbed(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=1.0, std=0.5)
    return module


def _of(make: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (make(),)


_input = _of(lambda: torch.randn(4, 6, 8))
_strided = _of(lambda: torch.randn(6, 4, 8).transpose(0, 1))
_half = _of(lambda: torch.randn(4, 6, 8, dtype=torch.bfloat16))
