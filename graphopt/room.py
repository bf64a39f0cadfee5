"""Whether a program's values fit in memory when it is run as it is."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import Tensor, fx

from graphopt.program import Program, val

FORWARD = 3
"""Copies of its largest value that a run without gradients holds at once: softmax, and its
argument in another dtype."""

WITH_GRADIENTS = 10
"""The same with gradients, and once more in float64, which is up to four times as large."""


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps that of small tensors, in pieces.

    Verification and calibration make and drop many tensors between the few that stay. SmolLM2-135M
    under GPTQ holds 0.6 GB less with it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def crowded(
    program: Program, copies: int = FORWARD, sizes: Mapping[Any, int] | None = None
) -> str | None:
    """In words, the value that does not fit in free memory so many times; ``None`` if all do.

    Args:
        sizes: symbol -> size; symbols left out have the size of the capture.
    """
    values = [n for n in program.graph.nodes if isinstance(val(n), Tensor)]
    largest: fx.Node | None = max(values, key=lambda n: nbytes(val(n), sizes), default=None)
    if largest is None:
        return None
    size, free = nbytes(val(largest), sizes), free_bytes(val(largest).device)
    if copies * size <= free:
        return None
    return f"`{largest.name}` alone takes {_gib(size)}, where {_gib(free)} are free"


def nbytes(fake: Tensor, sizes: Mapping[Any, int] | None = None) -> int:
    """Bytes of a value, with sizes as `extent` takes them."""
    return math.prod(extent(n, sizes) for n in fake.shape) * fake.element_size()


def extent(size: Any, sizes: Mapping[Any, int] | None = None) -> int:
    """A size as a number: by the values of its symbols, else as it was at capture."""
    if isinstance(size, int):
        return size
    known = size.node.expr.subs(sizes or {})
    if known.is_Integer:
        return int(known)
    return int(size.node.hint) if size.node.has_hint() else 0  # decided by values, as nonzero is


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
