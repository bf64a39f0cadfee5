"""How many floating-point operations a call takes, from the fake tensors that it reads and gives.

Products are counted by torch's own formulas (`torch.utils.flop_counter`); a composite that has none
runs on the meta device, where it falls apart into operators that do. All else counts a few
operations per element. A multiply-add is two operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from sympy import Integer
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    shape_wrapper,
)

aten = torch.ops.aten

UNBACKED = 1024
"""Stands for a size that only the data decides."""

MOVES = frozenset(
    {
        *("clone", "_to_copy", "to", "contiguous", "reshape", "flatten", "copy", "lift_fresh_copy"),
        *("cat", "stack", "hstack", "vstack", "pad", "constant_pad_nd", "flip", "roll", "repeat"),
        *("embedding", "gather", "index", "index_select", "take", "take_along_dim"),
        *("scatter", "slice_scatter", "select_scatter", "index_copy", "index_put", "one_hot"),
        *(
            "arange",
            "full",
            "full_like",
            "zeros",
            "zeros_like",
            "ones",
            "ones_like",
            "scalar_tensor",
        ),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_full", "new_ones", "new_zeros"),
        *("repeat_interleave", "tril", "triu", "fill", "expand_copy", "_unsafe_view", "as_strided"),
    }
)
"""Operators that only move or make values."""

PER_ELEMENT = {
    # maximum, difference, exponential, sum, quotient
    **dict.fromkeys(
        ("softmax", "_softmax", "log_softmax", "_log_softmax", "cross_entropy_loss"), 5
    ),
    # mean 1, centring 1, square and mean 2, scaling 1, affine 2
    **dict.fromkeys(("layer_norm", "native_layer_norm", "group_norm", "native_group_norm"), 7),
    # square and mean 2, scaling 1, weight 1
    **dict.fromkeys(("rms_norm", "_fused_rms_norm"), 4),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), 2),
}
"""Operations per element where it is not one."""


@dataclass(frozen=True)
class Like:
    """Shape, strides (in elements) and dtype of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Bytes of memory behind it: dims that an ``expand`` added hold nothing."""
        pairs = zip(self.shape, self.stride, strict=True)
        return prod(n for n, s in pairs if s or not n) * self.dtype.itemsize

    def meta(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


def hint(size: Any, sizes: Mapping[str, int] | None = None) -> int:
    """The value of a size: that seen at capture, or that which ``sizes`` gives its symbols.

    A symbol that only the data decides counts `UNBACKED` unless ``sizes`` names it.
    """
    if not isinstance(size, torch.SymInt):
        return int(size)
    if not sizes and size.node.hint is not None:
        return int(size.node.hint)
    seen = {str(symbol): v for symbol, v in size.node.shape_env.backed_var_to_val.items()}
    value = {**seen, **(sizes or {})}
    expression = size.node.expr
    symbols = expression.free_symbols
    return int(expression.xreplace({s: Integer(value.get(str(s), UNBACKED)) for s in symbols}))


def like(value: Any, sizes: Mapping[str, int] | None = None) -> Any:
    """``value``, or that of a node, with tensors and sizes made plain, and hashable."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout is torch.strided else (1,) * value.ndim
        shape, stride = (tuple(hint(n, sizes) for n in part) for part in (value.shape, strides))
        return Like(shape, stride, value.dtype)
    if isinstance(value, tuple | list):
        return tuple(like(item, sizes) for item in value)
    if isinstance(value, torch.SymBool | torch.SymFloat):
        return value.node.hint
    return hint(value, sizes) if isinstance(value, torch.SymInt) else value


def flops(node: Node, sizes: Mapping[str, int] | None = None) -> int:
    """Operations of one ``call_function`` node that computes; a view is not known here."""
    arguments = like(node.args, sizes)
    keywords = tuple((name, like(value, sizes)) for name, value in node.kwargs.items())
    result = like(node, sizes)
    if product := _product(node.target, arguments, keywords, result):
        return product
    name = operator(node)
    if name in MOVES:
        return 0
    largest = max((t.numel for t in tensors((arguments, result))), default=0)
    return PER_ELEMENT.get(name, 1) * largest


def operator(node: Node) -> str:
    """The operator's name without its overload: ``add`` of ``aten.add.Tensor``."""
    return str(getattr(_packet(node.target), "__name__", node.target))


def tensors(value: Any) -> list[Like]:
    """The tensors in a structure that ``like`` made."""
    if isinstance(value, Like):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, tuple) else []


@lru_cache(maxsize=4096)
def _product(target: Any, arguments: Any, keywords: Any, result: Any) -> int:
    """Operations of the matrix products and convolutions in a call; 0 where there are none."""
    formula = flop_registry.get(_packet(target)) or _OWN_BY_VALUE.get(_packet(target))
    args, kwargs = _meta(arguments), {name: _meta(value) for name, value in keywords}
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=_meta(result)))
    if not _is_composite(target) or len(tensors(arguments)) < 2:
        return 0
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_OWN) as counter:
        try:
            target(*args, **{**kwargs, **({"device": "meta"} if "device" in kwargs else {})})
        except RuntimeError:  # it asks for values, which a product never does
            return 0
    return int(counter.get_total_flops())


def _is_composite(target: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(target, OpOverload) and target.has_kernel_for_dispatch_key(key)


def _packet(target: Any) -> Any:
    return target.overloadpacket if isinstance(target, OpOverload) else target


def _meta(value: Any) -> Any:
    if isinstance(value, Like):
        return value.meta()
    return [_meta(item) for item in value] if isinstance(value, tuple) else value


def _contraction(operand: int) -> Callable[..., int]:
    """The formula of a product whose contracted axis is the last of the given operand."""

    def formula(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        return int(2 * prod(out_shape) * shapes[operand][-1])

    return formula


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Scores of ``(..., L, E)`` with ``(..., S, E)``, then their product with ``(..., S, V)``."""
    return int(2 * prod(q[:-1]) * k[-2] * (q[-1] + v[-1]))


_OWN: dict[Any, Callable[..., int]] = {
    aten.scaled_dot_product_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._int_mm: _contraction(0),
    aten._weight_int8pack_mm: _contraction(0),
    aten._weight_int4pack_mm: _contraction(0),
    aten._weight_int4pack_mm_for_cpu: _contraction(0),
    aten._grouped_mm: _contraction(0),
    aten.mv: _contraction(0),
    aten.dot: _contraction(0),
    aten.vdot: _contraction(0),
    aten.addmv: _contraction(1),
}
"""Formulas, of shapes, that torch lacks."""

_OWN_BY_VALUE = {packet: shape_wrapper(formula) for packet, formula in _OWN.items()}
