"""Which operators a body may call: those that compute values from their arguments."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._ops import OpOverload

OTHERS = frozenset(
    {
        "_log_softmax", "_safe_softmax", "_softmax", "_to_copy", "all", "amax", "amin", "any",
        "argmax", "argmin", "binary_cross_entropy", "binary_cross_entropy_with_logits", "cat",
        "clone", "contiguous", "count_nonzero", "cross_entropy_loss", "cumsum", "detach", "diff",
        "embedding", "fill", "flip", "full_like", "gather", "huber_loss", "index_select", "kl_div",
        "l1_loss", "linalg_vector_norm", "log_softmax", "logsumexp", "masked_fill", "max", "mean",
        "min", "mse_loss", "multi_margin_loss", "nanmean", "nansum", "nll_loss", "nll_loss_nd",
        "norm", "ones_like", "poisson_nll_loss", "prod", "reshape", "scatter", "scatter_add",
        "select", "slice", "smooth_l1_loss", "soft_margin_loss", "softmax", "sort", "squeeze",
        "std", "sum", "take_along_dim", "to", "topk", "type_as", "unsqueeze", "var", "view",
        "where", "zeros_like", "absolute", "divide", "expand_as", "floor_divide", "greater",
        "greater_equal", "hardswish", "isclose", "less", "less_equal", "log_sigmoid", "multiply",
        "negative", "not_equal", "rsub", "special_erf", "special_erfc", "special_exp2",
        "special_expit", "special_expm1", "special_log1p", "subtract", "true_divide",
    }
)  # fmt: skip
"""Operators without the tag ``pointwise`` that a body may call.

None of them reads or writes anything but its arguments, draws random numbers, or gives a tensor
whose size is a literal (``expand``, ``one_hot``, ``constant_pad_nd``): a text from elsewhere must
not be able to ask for memory at will.
"""

_ODD = frozenset({"equal"})
"""Tagged ``pointwise``, though their result is no tensor."""


def allowed(target: Any) -> bool:
    """Whether an operator may stand in a body."""
    if target is operator.getitem:
        return True
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return False
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    name = target._schema.name.removeprefix("aten::")
    return name in OTHERS or (torch.Tag.pointwise in target.tags and name not in _ODD)
