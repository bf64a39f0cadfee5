"""BatchNorm with fixed statistics: a multiply and an add per channel (Ioffe and Szegedy 2015)."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.program import Program, val
from graphopt.rewrite import (
    Builder,
    Candidate,
    Match,
    Profit,
    Refusal,
    Rule,
    arguments,
    either,
    op,
)

aten = torch.ops.aten

FIXED = aten._native_batch_norm_legit_no_training.default
_NORMS = (
    FIXED,
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.no_stats,
    aten._batch_norm_with_update_functional.default,
    aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default,
)
CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)
_TRANSPOSED = CONVOLUTIONS[6:9]


def is_transposed(convolution: fx.Node) -> bool:
    """Whether the weight is laid out ``(in, out / groups, ...)``."""
    return convolution.target in _TRANSPOSED or bool(arguments(convolution).get("transposed"))


def norm_of(inner: Any, name: str = "norm") -> Any:
    """Pattern: the normalised value, however the operator hands it out; binds the operator."""
    several = op(_NORMS, inner, ..., name=name, escapes=True)
    whole = op(aten.batch_norm.default, inner, ..., name=name)
    return either(op(operator.getitem, several, 0), whole)


class NormFold(Rule):
    """A fold of a norm into its neighbour, bound as ``layer``, and what all such folds refuse.

    ``frozen`` says which programs a rule is for: those whose parameters are constants, those whose
    parameters may change between calls, or (``None``) both, with a refusal for the latter.
    """

    profit = Profit.ALWAYS
    frozen: ClassVar[bool | None] = None

    def find(self, program: Program) -> Iterator[Candidate]:
        if self.frozen in (None, program.frozen):
            yield from (c for c in super().find(program) if c.match is not None)

    def check(self, match: Match) -> Refusal | None:
        return _batch_refusal(match) or self._state_refusal(match) or self.place_refusal(match)

    def place_refusal(self, match: Match) -> Refusal | None:  # noqa: ARG002
        """What speaks against folding at this place; for one kind of neighbour."""
        return None

    def _state_refusal(self, match: Match) -> Refusal | None:
        """Weights must be the model's own and, where they are replaced, used nowhere else."""
        if self.frozen is not False and not match.program.frozen:
            return Refusal("the model trains: its parameters may not be folded", match["norm"])
        layer = match.get("layer")
        weight = arguments(layer)["weight"] if layer else None
        if weight is None:
            return None
        if weight.op != "placeholder":
            return Refusal(f"the weight `{weight.name}` is computed in the graph", weight)
        other = next((user for user in weight.users if user is not layer), None)
        if other is None or self.frozen is False:
            return None
        return Refusal(f"the weight is also used by `{other.name}`", weight)


def _batch_refusal(match: Match) -> Refusal | None:
    """Statistics must be fixed, and nothing else that the norm returns be in use."""
    norm = match["norm"]
    given = arguments(norm)
    if given.get("training", norm.target is not FIXED) or given.get("running_mean") is None:
        reason = "the norm uses the statistics of each batch; only fixed ones can be folded"
        return Refusal(reason, norm, "model.eval()")
    if norm in match.escapes and any(user not in match.nodes for user in norm.users):
        return Refusal("the statistics that the norm returns are used too", norm)
    return None


def scale_and_shift(build: Builder, norm: fx.Node) -> tuple[Any, Any]:
    """``(C,)`` each: ``scale = weight / sqrt(var + eps)`` and ``shift = bias - mean * scale``."""
    given = arguments(norm)
    eps = given["eps"] if "eps" in given else given["epsilon"]
    weight, bias = given["weight"], given["bias"]
    scale = build(aten.rsqrt.default, build(aten.add.Tensor, given["running_var"], eps))
    scale = scale if weight is None else build(aten.mul.Tensor, weight, scale)
    moved = build(aten.mul.Tensor, given["running_mean"], scale)
    shift = build(aten.neg.default, moved) if bias is None else build(aten.sub.Tensor, bias, moved)
    return scale, shift


def scale_rows(build: Builder, weight: fx.Node, scale: fx.Node) -> Any:
    """``weight`` ``(C, ...)`` times ``scale`` ``(C,)`` along the first axis."""
    sizes = [-1] + [1] * (val(weight).dim() - 1)
    return build(aten.mul.Tensor, weight, build(aten.reshape.default, scale, sizes))


def scale_columns(build: Builder, weight: fx.Node, scale: fx.Node, groups: int) -> Any:
    """``weight`` ``(R, C, ...)``, in ``groups`` blocks of rows, times ``scale`` ``(groups * C,)``.

    Row ``r`` of block ``g`` has the channels ``g * C`` to ``(g + 1) * C`` of ``scale``.
    """
    rows, columns, *rest = val(weight).shape
    if groups == 1:
        factors = build(aten.reshape.default, scale, [1, columns, *[1] * len(rest)])
        return build(aten.mul.Tensor, weight, factors)
    blocks = build(aten.reshape.default, weight, [groups, rows // groups, columns, *rest])
    factors = build(aten.reshape.default, scale, [groups, 1, columns, *[1] * len(rest)])
    scaled = build(aten.mul.Tensor, blocks, factors)
    return build(aten.reshape.default, scaled, [rows, columns, *rest])


def with_weights(build: Builder, layer: fx.Node, x: Any, weight: Any, bias: Any) -> Any:
    """The layer on another input, weight and bias; both are rounded to the dtype of its weight."""
    dtype = val(arguments(layer)["weight"]).dtype
    given = {**arguments(layer), "input": x}
    given |= {"weight": _rounded(build, weight, dtype), "bias": _rounded(build, bias, dtype)}
    target: Any = layer.target
    return build(target, *given.values())


def _rounded(build: Builder, value: Any, dtype: torch.dtype) -> Any:
    fake = val(value)
    same = not isinstance(fake, Tensor) or fake.dtype == dtype
    return value if same else build(aten._to_copy.default, value, dtype=dtype)
