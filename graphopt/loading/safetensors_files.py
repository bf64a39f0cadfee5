"""safetensors files: a JSON header that must describe exactly the bytes that follow it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.loading.findings import Limits, reading
from graphopt.loading.tensors import check_tensors


@dataclass(frozen=True)
class HeaderTensor:
    """One tensor of a safetensors file: its type (``F32``), shape, and byte range in the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path, limits: Limits) -> tuple[list[HeaderTensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file, read from its header alone.

    Raises:
        LoadError: the header is no header, or its ranges overlap, leave gaps, leave the file, or
            do not fit the shapes.
    """
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, limits.text_bytes):
            raise ValueError(f"the header claims {length} bytes of a file that has {size}")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tensors = sorted((_tensor(n, e) for n, e in header.items()), key=lambda t: (t.start, t.end))
        end = 0
        for tensor in tensors:
            if tensor.start != end:
                raise ValueError(f"tensor {tensor.name!r:.80} overlaps another or leaves a gap")
            end = tensor.end
        if end != size - 8 - length:
            raise ValueError(f"the tensors cover {end} of {size - 8 - length} bytes")
    return tensors, {str(k): str(v) for k, v in metadata.items()}


def _tensor(name: str, entry: dict[str, Any]) -> HeaderTensor:
    (start, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if any(type(n) is not int or n < 0 for n in (start, end, *shape)):
        raise ValueError(f"tensor {name!r:.80} has negative or odd sizes")
    if (end - start) * 8 != math.prod(shape) * _bits(dtype):
        raise ValueError(f"tensor {name!r:.80}: {end - start} bytes for {dtype} {tuple(shape)}")
    return HeaderTensor(name, dtype, tuple(shape), start, end)


def _bits(dtype: str) -> int:
    """Bits per element, which the type's name says: ``BF16``, ``F8_E4M3``; ``BOOL`` takes 8."""
    width = re.fullmatch(r"[A-Z]+(\d+)(_\w+)?", dtype)
    if not width and dtype != "BOOL":
        raise ValueError(f"the type {dtype!r:.40} is unknown")
    return int(width[1]) if width else 8


def load_safetensors(path: Path, limits: Limits) -> dict[str, torch.Tensor]:
    """The state dict in a safetensors file, on the CPU."""
    from safetensors.torch import load_file

    read_header(path, limits)
    with reading(path):
        state: dict[str, torch.Tensor] = load_file(path, device="cpu")
    check_tensors(state, str(path))
    return state
