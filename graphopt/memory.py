"""Which tensors lie in the same memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor


def has_storage(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor that lies in one storage; sparse ones do not."""
    return isinstance(value, Tensor) and value.layout is torch.strided


def storage(value: Tensor) -> int:
    """Equal for tensors that live in one storage, fake ones too."""
    return int(value.untyped_storage()._cdata)


def start(value: Tensor) -> int:
    """Address of the memory that a real tensor lies in, 0 where it has none (yet)."""
    return Tensor.untyped_storage(value).data_ptr() if Tensor.data_ptr(value) else 0


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two real tensors lie in one memory; the parts they show may be apart."""
    return start(a) == start(b) != 0


def overlapping(values: Sequence[Any], written: Collection[int]) -> int | None:
    """A written position whose value shows bytes that another one shows too, else ``None``.

    Judged by the extents of real tensors: interleaved ones count as overlapping.
    """
    extents = sorted(
        (v.data_ptr(), v.data_ptr() + _extent(v), position)
        for position, v in enumerate(values)
        if has_storage(v) and v.numel()
    )
    last = last_written = (0, -1)
    for first, end, position in extents:
        if position in written and first < last[0]:
            return position
        if first < last_written[0]:
            return last_written[1]
        last = max(last, (end, position))
        if position in written:
            last_written = max(last_written, (end, position))
    return None


def _extent(value: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if value.is_contiguous():
        return value.nbytes
    pairs = zip(value.shape, value.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in pairs)) * value.element_size()
