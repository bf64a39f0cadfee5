"""Views of contiguous tensors of symbolic sizes, without a question about these.

Torch's own reference of a view asks which sizes are one, to say which strides a view has. Where the
tensor has no gaps the view has none either, whatever the sizes are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._sympy.functions import Max

from graphopt.analysis.axis_rules.sizes import Size, product, quotient, size_of, tidy

aten = torch.ops.aten

VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})


def viewed(tensor: Tensor, sizes: Sequence[Any]) -> Tensor | None:
    """A tensor of the sizes that a view of ``tensor`` has; one of them may be -1.

    ``None`` where the tensor may have gaps, or the sizes may not be those of all its numbers.
    """
    total = size_of(tensor.numel())
    named = product(size_of(size) for size in sizes if not _is_left(size))
    left = quotient(total, named)
    if left is None or not is_packed(tensor):
        return None
    if not any(map(_is_left, sizes)):
        return tensor.new_empty(sizes) if left == 1 else None
    others = math.prod(size for size in sizes if not _is_left(size))
    return tensor.new_empty([tensor.numel() // others if _is_left(s) else s for s in sizes])


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor is contiguous for certain, or empty; nothing is asked of its sizes."""
    step: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if _at_least_none(size_of(stride)) != step:
            return False
        step = product((step, size_of(size)))
    return True


def _at_least_none(stride: Size) -> Size:
    """With ``n`` for ``max(1, n)``, as torch writes strides of what may be empty."""
    if isinstance(stride, int):
        return stride

    def plain(*given: Any) -> Any:
        others = [n for n in given if n != 1]
        return others[0] if len(others) == 1 < len(given) else Max(*given)

    return tidy(stride.replace(Max, plain))


def _is_left(size: Any) -> bool:
    """Whether a size stands for what the others leave."""
    return isinstance(size, int) and size == -1
