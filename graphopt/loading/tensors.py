"""Checks on loaded tensors: what their numbers claim must lie in the memory they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from graphopt.loading.findings import Finding, refuse

_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def check_tensors(state: Any, where: str = "state dict") -> None:
    """Refuse tensors whose shape, strides, offset or indices reach outside their storage.

    Args:
        state: a tensor, or mappings, sequences and modules of tensors, nested as deep as they like.
        where: what the tensors came from, for messages.

    Raises:
        LoadError: a tensor needs more elements than its storage holds, a sparse tensor has indices
            out of range or out of order, a quantized one scales that do not fit its axis, or a
            tensor has no data at all (the meta device).
    """
    refuse(tensor_findings(state, where))


def tensor_findings(state: Any, where: str) -> Iterator[Finding]:
    """What :func:`check_tensors` refuses, tensor by tensor."""
    for name, tensor in named_tensors(state):
        with torch.no_grad():
            reason = _reason(tensor)
        if reason:
            yield Finding(reason, f"{where}, tensor {name}", "get an undamaged copy of the file")


def named_tensors(state: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested containers, with its path, in order."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", state)]
    while stack:
        name, item = stack.pop()
        if isinstance(item, torch.Tensor):
            yield name or "(the value)", item
        elif id(item) not in seen:
            seen.add(id(item))
            stack.extend(reversed([(f"{name}.{k}" if name else k, v) for k, v in _children(item)]))


def _children(item: Any) -> list[tuple[str, Any]]:
    if isinstance(item, torch.nn.Module):
        return [*item.named_parameters(), *item.named_buffers()]
    if isinstance(item, Mapping):
        return [(str(key), value) for key, value in item.items()]
    if isinstance(item, list | tuple | set | frozenset):
        return [(str(i), value) for i, value in enumerate(item)]
    return []


def _reason(tensor: torch.Tensor) -> str | None:
    try:
        if tensor.is_meta:
            return "the tensor has a shape but no data (meta device)"
        if tensor.is_nested:
            return _nested_reason(tensor)
        if tensor.layout == torch.sparse_coo:
            return _coo_reason(tensor)
        if tensor.layout in _COMPRESSED:
            return _compressed_reason(tensor)
        if tensor.layout != torch.strided:
            return f"the layout {tensor.layout} is not one that models are saved in"
        return _strided_reason(tensor) or _quantized_reason(tensor)
    except RuntimeError as error:
        return f"the tensor breaks torch's invariants: {str(error).splitlines()[0]}"


def bytes_of(elements: int, dtype: torch.dtype) -> int:
    """Bytes that ``elements`` take in memory; sub-byte quantized types share a byte."""
    per_byte = {torch.quint4x2: 2, torch.quint2x4: 4}.get(dtype, 1)
    return -(-elements // per_byte) * dtype.itemsize


def _strided_reason(tensor: torch.Tensor) -> str | None:
    sizes, strides = tuple(map(int, tensor.shape)), tensor.stride()
    if any(n < 0 for n in (*sizes, *strides, tensor.storage_offset())):
        return f"negative numbers in shape {sizes}, strides {strides} or offset"
    if tensor.numel() == 0:
        return None
    reach = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1
    needed = bytes_of(int(tensor.storage_offset()) + reach, tensor.dtype)
    held = tensor.untyped_storage().nbytes()
    if needed > held:
        return f"shape {sizes} needs {needed} bytes of a storage that holds {held}"
    return None


def _coo_reason(tensor: torch.Tensor) -> str | None:
    parts = (tensor._indices(), tensor._values())
    reason = next(filter(None, map(_strided_reason, parts)), None)
    if reason is None:
        torch._validate_sparse_coo_tensor_args(*parts, tensor.shape, tensor.is_coalesced())
    return reason


def _compressed_reason(tensor: torch.Tensor) -> str | None:
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    outer = tensor.crow_indices() if by_row else tensor.ccol_indices()
    inner = tensor.col_indices() if by_row else tensor.row_indices()
    parts = (outer, inner, tensor.values())
    reason = next(filter(None, map(_strided_reason, parts)), None)
    if reason is None:
        torch._validate_sparse_compressed_tensor_args(*parts, tensor.shape, tensor.layout)
    return reason


def _nested_reason(tensor: torch.Tensor) -> str | None:
    if tensor.layout != torch.strided:
        return None  # jagged: an ordinary tensor subclass whose parts are tensors
    sizes, strides = tensor._nested_tensor_size(), tensor._nested_tensor_strides()
    offsets = tensor._nested_tensor_storage_offsets()
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    for size, stride, offset in zip(
        sizes.tolist(), strides.tolist(), offsets.tolist(), strict=True
    ):
        reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if min(*size, *stride, offset) < 0 or (0 not in size and offset + reach > held):
            return f"a nested part of shape {tuple(size)} reaches outside a storage of {held}"
    return None


def _quantized_reason(tensor: torch.Tensor) -> str | None:
    per_channel = (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
    if not tensor.is_quantized or tensor.qscheme() not in per_channel:
        return None
    axis, scales = tensor.q_per_channel_axis(), tensor.q_per_channel_scales()
    points = tensor.q_per_channel_zero_points()
    if not 0 <= axis < tensor.dim() or not len(scales) == len(points) == tensor.shape[axis]:
        return f"{len(scales)} scales do not fit axis {axis} of shape {tuple(tensor.shape)}"
    return None
