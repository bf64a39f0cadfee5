"""ONNX files: external data must lie inside the model's folder, and within its files."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graphopt.errors import MissingDependencyError
from graphopt.loading.findings import Finding, Limits, env_name, reading, refuse
from graphopt.onnx_types import dtype_name

_PROTOBUF_LIMIT = 2 << 30


def read_onnx(path: Path) -> Any:
    """Parse an ONNX file without its external data.

    Returns:
        The ``onnx.ModelProto``.

    Raises:
        LoadError: the file is no ONNX model, or larger than protobuf allows.
        MissingDependencyError: the package onnx is not installed.
    """
    try:
        onnx = importlib.import_module("onnx")
    except ImportError as error:
        raise MissingDependencyError(
            "reading an ONNX file needs the package onnx", fix="pip install 'graphopt[onnx]'"
        ) from error
    with reading(path):
        if path.stat().st_size > _PROTOBUF_LIMIT:
            raise ValueError("it is larger than the 2 GiB that protobuf allows")
        model = onnx.load(str(path), load_external_data=False)
        if not model.ir_version or not (model.graph.node or model.graph.output):
            raise ValueError("it is no ONNX model: it has no version or no graph")
    return model


def check_external_data(path: str | Path, limits: Limits | None = None) -> tuple[Path, ...]:
    """Check where an ONNX model's external data lies; return the files, each once.

    Raises:
        LoadError: a location is absolute, leads out of the model's folder (``..`` or a link), is
            not a regular file, or is shorter than the offset and length that the model states.
    """
    path = Path(path)
    model = read_onnx(path)
    with reading(path):
        refuse(external_findings(model, path, limits or Limits.from_env()))
    files = (path.parent / location(tensor).get("location", "") for tensor in _external(model))
    return tuple(dict.fromkeys(files))


def external_findings(model: Any, path: Path, limits: Limits) -> Iterator[Finding]:
    """What is wrong with the external data of a parsed model."""
    for tensor in _external(model):
        entries = location(tensor)
        if len(entries) != len(tensor.external_data):
            yield Finding("an entry of the external data is there twice", f"{path}, {tensor.name}")
        elif reason := _reason(entries, path, limits) or _shape_reason(tensor, entries, path):
            yield Finding(reason, f"{path}, tensor {tensor.name!r:.80}")


def location(tensor: Any) -> dict[str, str]:
    """The entries that say where an external tensor lies: location, offset, length (bytes)."""
    return {entry.key: entry.value for entry in tensor.external_data}


def all_tensors(model: Any) -> Iterator[Any]:
    """Every ``TensorProto`` of a model: initializers and attributes, in subgraphs and functions."""
    stack = [model.graph, *model.functions, *model.training_info]
    while stack:
        message = stack.pop()
        kind = message.DESCRIPTOR.name
        if kind == "TensorProto":
            yield message
        elif kind == "TrainingInfoProto":
            stack += [message.initialization, message.algorithm]
        elif kind == "SparseTensorProto":
            stack += [message.values, message.indices]
        elif kind == "GraphProto":
            stack += [*message.initializer, *message.sparse_initializer, *message.node]
        elif kind == "AttributeProto":
            single = ("t", "g", "sparse_tensor")
            stack += [getattr(message, name) for name in single if message.HasField(name)]
            stack += [*message.tensors, *message.graphs, *message.sparse_tensors]
        else:  # FunctionProto, NodeProto
            stack += [*getattr(message, "node", ()), *_attributes(message)]


def _attributes(message: Any) -> list[Any]:
    if message.DESCRIPTOR.name == "FunctionProto":
        return list(message.attribute_proto)
    return list(message.attribute)


def _external(model: Any) -> Iterator[Any]:
    return (t for t in all_tensors(model) if t.external_data or t.data_location == 1)


def _reason(entries: dict[str, str], path: Path, limits: Limits) -> str | None:
    text = entries.get("location", "")
    if not _is_below(text):
        return f"the external data {text!r:.80} is not a path below the model's folder"
    file = path.parent / text
    folders = (path.parent.resolve(), path.resolve().parent)  # a model may itself be a link
    if not any(file.resolve().is_relative_to(folder) for folder in folders):
        return f"the external data {text!r:.80} is a link that leads out of the model's folder"
    if not file.is_file():
        return f"the external data {text!r:.80} is missing, or no regular file"
    size = file.stat().st_size
    if size > limits.total_bytes:
        return f"the external data has {size} bytes, over {env_name('total_bytes')}"
    return _range_reason(entries, size)


def _is_below(text: str) -> bool:
    """Whether a location is a relative path that cannot climb, on any system."""
    plain = text.isprintable() and not set(text) & set("\\:")
    return bool(text) and plain and not Path(text).is_absolute() and ".." not in Path(text).parts


def _range_reason(entries: dict[str, str], size: int) -> str | None:
    offset, length = entries.get("offset") or "0", entries.get("length") or "0"
    if not (offset.isascii() and offset.isdigit() and length.isascii() and length.isdigit()):
        return f"offset {offset!r:.40} and length {length!r:.40} are not numbers of bytes"
    if int(offset) + int(length) > size:
        return f"bytes {offset} to {int(offset) + int(length)} of a file that has {size}"
    return None


def _shape_reason(tensor: Any, entries: dict[str, str], path: Path) -> str | None:
    needed = tensor_bytes(tensor)
    held = (path.parent / entries["location"]).stat().st_size - int(entries.get("offset") or 0)
    if entries.get("length"):
        held = int(entries["length"])
    if needed is None or min(tensor.dims, default=0) < 0:
        return f"type {tensor.data_type} and shape {tuple(tensor.dims)} make no tensor"
    if needed > held:
        return f"shape {tuple(tensor.dims)} needs {needed} bytes of external data that has {held}"
    return None


def tensor_bytes(tensor: Any) -> int | None:
    """Bytes that a ``TensorProto``'s type and shape take, None for a type without fixed size."""
    name = dtype_name(tensor.data_type)
    width = re.match(r"[a-z]+(\d+)", name)
    bits = int(width[1]) if width else {"bool": 8}.get(name)
    return None if bits is None else -(-math.prod(tensor.dims) * bits // 8)
