"""Elementwise operations: every dim is parallel, dims of size one broadcast.

All operators that torch tags ``pointwise`` take this rule; the rest are named here.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from graphopt.analysis.axis_rules.call import Call, Outcome, rule
from graphopt.analysis.axis_rules.labels import Term, combine
from graphopt.analysis.axis_rules.sizes import Shape, Untrackable


def trailing(rank: int) -> tuple[int, ...]:
    """Names that make dims broadcast: counted from the last."""
    return tuple(range(-rank, 0))


def spread(call: Call, operands: Iterable[Node], *, random: bool = False) -> Outcome:
    """Broadcast ``operands`` against each other into every result of full rank."""
    nodes = list(operands)
    terms = [Term(node, trailing(call.rank(node))) for node in nodes]
    results = [None if _empty(shape) else trailing(len(shape)) for shape in call.results]
    return combine(call, terms, results, random=random)


def _empty(shape: Shape) -> bool:
    return shape == (0,)


@rule(
    "where.ScalarOther", "where.ScalarSelf", "where.Scalar", "masked_fill.Tensor", "floor_divide",
    "floor_divide.Scalar", "__and__.Tensor", "__and__.Scalar", "__or__.Tensor", "__or__.Scalar",
    "rsub.Tensor", "true_divide.Scalar", "divide.Tensor", "divide.Scalar", "divide.Tensor_mode",
    "divide.Scalar_mode", "multiply.Tensor", "multiply.Scalar", "subtract.Tensor",
    "subtract.Scalar", "greater.Tensor", "greater.Scalar", "greater_equal.Tensor",
    "greater_equal.Scalar", "less.Tensor", "less.Scalar", "less_equal.Tensor", "less_equal.Scalar",
    "not_equal.Tensor", "not_equal.Scalar", "absolute", "negative", "fix", "arccos", "arccosh",
    "arcsin", "arcsinh", "arctan", "arctan2", "arctanh", "hardswish", "log_sigmoid",
    "log_sigmoid_forward", "polar", "complex", "real", "imag", "conj", "isreal", "isclose",
    "float_power.Tensor_Tensor", "float_power.Tensor_Scalar", "float_power.Scalar",
    "special_expit", "special_erf", "special_erfc", "special_exp2", "special_expm1",
    "special_log1p", "fake_quantize_per_tensor_affine",
)  # fmt: skip
def elementwise(call: Call) -> Outcome:
    return spread(call, call.tensors)


@rule(
    "alias", "clone", "detach", "lift_fresh", "lift_fresh_copy", "lift", "contiguous", "_to_copy",
    "to.dtype", "to.device", "to.dtype_layout", "to.other", "to.prim_dtype",
    "type_as", "_conj", "_neg_view", "resolve_conj", "resolve_neg",
)  # fmt: skip
def same(call: Call) -> Outcome:
    """The first argument as it is; a second one only says which dtype or device."""
    return spread(call, [call.main])


@rule("copy", "fill.Scalar", "fill.Tensor", "zero")
def overwrite(call: Call) -> Outcome:
    """The values of another tensor or a number in the shape of the first, and sliced with it."""
    return spread(call, call.tensors)


@rule("prelu", "_prelu_kernel")
def prelu(call: Call) -> Outcome:
    """The weight ``(C,)`` runs along dim 1 of the input."""
    rank = call.rank(call.main)
    weight = call["weight"]
    names = trailing(rank)[1:2] if call.rank(weight) == 1 else trailing(call.rank(weight))
    return combine(call, [Term(call.main, trailing(rank)), Term(weight, names)], [trailing(rank)])


@rule("dropout", "feature_dropout", "alpha_dropout", "native_dropout", "bernoulli", "bernoulli.p",
      "bernoulli.Tensor", "rrelu", "normal.Tensor_float", "normal.float_Tensor",
      "normal.Tensor_Tensor", "normal_functional", "uniform", "exponential")  # fmt: skip
def noise(call: Call) -> Outcome:
    """Elementwise with random draws, unless the call is in inference mode."""
    quiet = call.get("train", "training", default=True) is False or call.get("p") == 0
    if call.op == "rrelu" and not quiet:
        raise Untrackable("how many random numbers are drawn depends on the values")
    return spread(call, call.tensors, random=not quiet)
