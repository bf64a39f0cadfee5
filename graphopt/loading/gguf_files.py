"""GGUF files (the format of llama.cpp), read from their header alone.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from graphopt.loading.facts import TensorFacts
from graphopt.loading.findings import Limits, reading

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 100_000
_MAX_DIMS = 8
# Tensor type: name, elements per block, bytes per block.
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    30: ("BF16", 1, 2),
}


@dataclass
class _Reader:
    """Reads little-endian values from a header of at most ``left`` bytes."""

    file: BinaryIO
    left: int

    def take(self, size: int) -> bytes:
        self.left -= size
        data = self.file.read(size) if self.left >= 0 else b""
        if len(data) != size:
            raise ValueError(f"the header claims {size} bytes that are not there")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> str:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return str(self.number(_NUMBERS[kind]))
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            self.take(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
        else:
            for _ in range(count):
                self.value(inner)
        return f"({count} values)"


def read_gguf(path: Path, limits: Limits) -> tuple[dict[str, str], tuple[TensorFacts, ...]]:
    """The metadata and tensors of a GGUF file; long arrays are given by their length.

    Raises:
        LoadError: the header is damaged, or a tensor lies outside the file.
    """
    with reading(path), path.open("rb") as file:
        reader = _Reader(file, limits.text_bytes)
        if reader.take(4) != b"GGUF" or (version := reader.number("I")) not in (2, 3):
            raise ValueError("it is no GGUF file of version 2 or 3")
        tensor_count, entry_count = reader.number("Q"), reader.number("Q")
        if max(tensor_count, entry_count) > _MAX_ENTRIES:
            raise ValueError(f"{tensor_count} tensors and {entry_count} entries are too many")
        entries = [(reader.text(), reader.value(reader.number("I"))) for _ in range(entry_count)]
        tensors = [_tensor(reader) for _ in range(tensor_count)]
        metadata = dict(entries)
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-file.tell() // alignment) * alignment
        size = os.fstat(file.fileno()).st_size
    with reading(path):
        for tensor, offset in tensors:
            if start + offset + (tensor.bytes or 0) > size:
                raise ValueError(f"tensor {tensor.name!r:.80} lies outside the file")
    shown = {k: v for k, v in metadata.items() if len(v) <= 200}
    return {"gguf version": str(version), **shown}, tuple(t for t, _ in tensors)


def _tensor(reader: _Reader) -> tuple[TensorFacts, int]:
    name, dims = reader.text(), reader.number("I")
    if dims > _MAX_DIMS:
        raise ValueError(f"tensor {name!r:.80} has {dims} axes")
    shape = tuple(reversed([reader.number("Q") for _ in range(dims)]))
    code, offset = reader.number("I"), reader.number("Q")
    label, block, nbytes = _TYPES.get(code, (f"type {code}", 1, 0))
    held = -(-math.prod(shape) // block) * nbytes if nbytes else None
    return TensorFacts(name, label, shape, held), offset
