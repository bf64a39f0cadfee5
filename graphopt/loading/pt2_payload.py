"""The weights and constants of a ``.pt2`` file: raw bytes, and a config that views them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from graphopt.loading.archive import Archive
from graphopt.loading.expressions import text_is_tame
from graphopt.loading.findings import Finding, reading

# torch's serialized ScalarType (torch/_export/serde/schema.py).
_FIRST = "uint8 int8 int16 int32 int64 float16 float32 float64 complex32 complex64 complex128 bool "
_SECOND = "uint16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu uint32 "
DTYPE_NAMES = {
    **dict(enumerate([*_FIRST.split(), "bfloat16"], 1)),
    **dict(enumerate([*_SECOND.split(), "uint64"], 28)),
}
_ITEMSIZE = {code: getattr(torch, name).itemsize for code, name in DTYPE_NAMES.items()}
_STRIDED = 7


def read_config(archive: Archive, record: str) -> dict[str, dict[str, Any]]:
    """A payload config: tensor name to its file, kind and view."""
    where = f"{archive.where}, member {record}"
    with reading(where):
        config = json.loads(archive.read(record))["config"]
        if not isinstance(config, dict) or not all(isinstance(v, dict) for v in config.values()):
            raise ValueError("it is no payload config")
        return config


def payload_findings(archive: Archive, record: str, kind: str) -> Iterator[Finding]:
    """What is wrong with the weights (``kind="weight"``) or constants (``kind="tensor"``)."""
    where = f"{archive.where}, member {record}"
    if record not in archive.records:
        yield Finding("the member is missing", where)
        return
    folder = record.rpartition("/")[0]
    for name, entry in read_config(archive, record).items():
        if reason := _entry_reason(archive, name, entry, folder, kind):
            yield Finding(reason, f"{where}, tensor {name!r:.80}")


def _entry_reason(
    archive: Archive, name: str, entry: dict[str, Any], folder: str, kind: str
) -> str | None:
    if entry.get("use_pickle") is not False:
        return "the config says use_pickle: torch would run a pickle from this file"
    if not text_is_tame(name):
        return "the tensor's name would become code"
    file = entry.get("path_name")
    if not isinstance(file, str) or not re.fullmatch(rf"{kind}_\d+", file):
        return f"the tensor's file {file!r:.80} is not one that torch.export.save writes"
    member = archive.records.get(f"{folder}/{file}")
    if member is None:
        return f"the tensor's file {file} is not in the archive"
    return view_reason(entry.get("tensor_meta"), member.size)


def view_reason(meta: Any, held: int) -> str | None:
    """Why a serialized view does not fit into ``held`` bytes, or None where it does."""
    try:
        itemsize = _ITEMSIZE[meta["dtype"]]
        sizes, strides = ([_size(n) for n in meta[key]] for key in ("sizes", "strides"))
        offset = _size(meta["storage_offset"])
        if meta["layout"] != _STRIDED or len(sizes) != len(strides):
            return f"the tensor's layout {meta['layout']}, sizes and strides make no dense tensor"
    except (KeyError, TypeError, ValueError) as error:
        return f"the tensor's description makes no sense: {error!r:.80}"
    if 0 in sizes:
        return None
    reach = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1
    if reach * itemsize > held:
        return f"shape {tuple(sizes)} needs {reach * itemsize} bytes of a file that holds {held}"
    return None


def _size(value: Any) -> int:
    number = value["as_int"]
    if type(number) is not int or number < 0:
        raise ValueError(f"the size {number!r}")
    return number


def view_bytes(meta: dict[str, Any]) -> int | None:
    """Bytes that the elements of a serialized tensor take, None for an unknown type or shape."""
    shape, itemsize = shape_of(meta), _ITEMSIZE.get(meta["dtype"])
    sizes = [n for n in shape if isinstance(n, int)]
    return math.prod(sizes) * itemsize if itemsize and len(sizes) == len(shape) else None


def shape_of(meta: dict[str, Any]) -> tuple[int | str, ...]:
    """The shape of a serialized tensor; symbolic sizes as text."""
    return tuple(
        size["as_int"] if "as_int" in size else _symbol(size["as_expr"]["expr_str"])
        for size in meta["sizes"]
    )


def _symbol(expression: str) -> str:
    return re.sub(r"Symbol\('(\w+)'[^)]*\)", r"\1", expression)
