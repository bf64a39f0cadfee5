"""What a call computes on, what it gives, and what it refuses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """``hidden (N, D)``, ``weight (V, D)``, ``target (N,)``, ``bias (V,)``; the soft-cap ``c``."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    ignore_index: int = -100


class Summaries(NamedTuple):
    """Numbers per row ``(N,)``, float32 (float64 for float64); empty where not asked for."""

    lse: Tensor
    target_logit: Tensor
    logit_sum: Tensor
    entropy: Tensor
    argmax: Tensor


class Cotangents(NamedTuple):
    """Of the differentiable summaries; ``None`` where nothing depends on one."""

    lse: Tensor | None
    target_logit: Tensor | None
    logit_sum: Tensor | None
    entropy: Tensor | None


def check(head: Head) -> None:
    """Refuse operands that are not a head; sizes that are symbols are not compared.

    Raises:
        ValueError: says what was found and what was expected.
    """
    hidden, weight, target, bias, softcap, _ = head
    shapes = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"{shapes} are not matrices (N, D) and (V, D)")
    if _differ(hidden.shape[1], weight.shape[1]):
        raise ValueError(f"{shapes} differ in their columns")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: cast one to the other")
    if isinstance(weight.shape[0], int) and not weight.shape[0]:
        raise ValueError(f"weight {tuple(weight.shape)} has no classes")
    if target.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"target is {target.dtype}; give classes as int32 or int64")
    if target.dim() != 1 or _differ(target.shape[0], hidden.shape[0]):
        raise ValueError(f"target {tuple(target.shape)} is not one class for each row of {shapes}")
    if bias is not None and (bias.dim() != 1 or _differ(bias.shape[0], weight.shape[0])):
        raise ValueError(f"bias {tuple(bias.shape)} is not one number for each row of {shapes}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; give a positive number, or None for no cap")


def _differ(one: Any, other: Any) -> bool:
    return isinstance(one, int) and isinstance(other, int) and one != other


def check_targets(head: Head) -> None:
    """Refuse targets that are no class.

    On a GPU too: one reduction of the ``N`` targets, for which the host waits. While launches are
    captured nothing can wait: an assertion on the device surfaces later and names no row. Kernels
    compare targets with classes and never find memory by them.

    Raises:
        IndexError: names the first row.
    """
    target, classes = head.target, head.weight.shape[0]
    wrong = (target != head.ignore_index) & ((target < 0) | (target >= classes))
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        torch._assert_async(~wrong.any(), f"a target is out of range for {classes} classes")
    elif wrong.any():
        row = int(wrong.int().argmax())
        found = int(target[row])
        raise IndexError(f"row {row}: target {found} is out of range for {classes} classes")


def counted(head: Head) -> Tensor:
    """Which rows have a target ``(N,)``."""
    return head.target != head.ignore_index


def wide(dtype: torch.dtype) -> torch.dtype:
    """What logits are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
