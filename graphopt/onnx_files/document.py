"""An ONNX file in memory: read after it was checked, written whole, run in ONNX Runtime."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.emit.onnx_drafts import EXTERNAL_ABOVE
from graphopt.emit.onnx_runtime import open_session
from graphopt.loading.findings import Limits, reading
from graphopt.loading.onnx_files import check_external_data, read_onnx

SMALLEST = 1024
"""Bytes of a tensor from which on it goes to the file of external data, where there is one."""


@dataclass(frozen=True)
class Document:
    """An ONNX file.

    Attributes:
        proto: the ``onnx.ModelProto`` as it was read; external data stays in its files.
        model: the same as an ``onnx_ir.Model``; None where that cannot hold all of the file.
        lacking: what it cannot hold, in words; empty where it can.
        data: files of external data.
    """

    path: Path
    proto: Any
    model: Any
    lacking: str = ""
    data: tuple[Path, ...] = ()

    @property
    def external(self) -> bool:
        return bool(self.data)


def read_document(path: str | Path) -> Document:
    """Read a file whose external data lies inside its folder.

    Raises:
        LoadError: it is damaged, no ONNX model, or its external data is refused.
        MissingDependencyError: a package for ONNX files is not installed.
    """
    from graphopt.emit.onnx_runtime import require

    require("onnx", "onnx_ir", "onnxruntime")
    source = Path(path)
    data = check_external_data(source, Limits.from_env())
    proto = read_onnx(source)
    with reading(source):
        document = document_of(proto, source, data)
        if document.model is not None:
            onnx_proto(document.model)  # texts that cannot be written again are damage too
    return document


def document_of(proto: Any, path: Path, data: tuple[Path, ...] = ()) -> Document:
    """A document of a parsed model."""
    import onnx_ir

    if lacking := _lacking(proto):
        return Document(path, proto, None, lacking, data)
    model = onnx_ir.serde.deserialize_model(proto)
    onnx_ir.external_data.set_base_dir(model.graph, str(path.parent))
    return Document(path, proto, model, "", data)


def _lacking(proto: Any) -> str:
    """What of a file rewriting would lose."""
    if proto.training_info:
        return "the file holds how to train it"
    if any(graph.sparse_initializer for graph in graphs_of(proto)):
        return "the file holds sparse initializers"
    return ""


def graphs_of(proto: Any) -> Iterator[Any]:
    """The graph of a ``ModelProto`` and those in attributes of its nodes, in functions too."""
    stack = [proto.graph, *proto.functions]
    while stack:
        holder = stack.pop()
        if holder.DESCRIPTOR.name == "GraphProto":
            yield holder
        for node in holder.node:
            for attribute in node.attribute:
                stack += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def tensors_of(model: Any) -> Iterator[Any]:
    """Initializers and tensors in attributes of an ``onnx_ir`` model, wherever they are."""
    import onnx_ir

    for graph in model.graphs():
        yield from (v.const_value for v in graph.initializers.values() if v.const_value is not None)
    holders = [model.graph, *model.functions.values()]
    for node in (n for holder in holders for n in holder.all_nodes()):
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == onnx_ir.AttributeType.TENSOR:
                yield attribute.as_tensor()
            elif attribute.type == onnx_ir.AttributeType.TENSORS:
                yield from attribute.as_tensors()


def tensor_bytes(tensor: Any) -> int:
    """Bytes that an ``onnx_ir`` tensor takes in a file."""
    import onnx_ir

    if tensor.dtype == onnx_ir.DataType.STRING:
        return sum(len(text) for text in tensor.string_data())
    return int(tensor.nbytes)


def stored_bytes(model: Any) -> int:
    """Bytes of all tensors of a model."""
    return sum(map(tensor_bytes, tensors_of(model)))


def node_count(model: Any) -> int:
    """Operators of a model, in subgraphs and functions too; constants are none."""
    holders = [model.graph, *model.functions.values()]
    return sum(n.op_type != "Constant" for holder in holders for n in holder.all_nodes())


def names_inside(model: Any) -> set[str]:
    """Names of values that subgraphs define: an outer value of such a name would be hidden."""
    inner = [g for g in model.graphs() if g is not model.graph]
    names = {v.name for g in inner for v in (*g.inputs, *g.initializers.values())}
    return names | {v.name for g in inner for n in g for v in n.outputs}


def write_model(model: Any, path: Path, *, external: bool) -> None:
    """Write an ``onnx_ir`` model; the same bytes for the same model.

    Args:
        external: tensors go to a file beside it, as they do where they are too many for protobuf.
    """
    import onnx_ir

    if external or stored_bytes(model) > EXTERNAL_ABOVE:
        name = f"{path.name}.data"
        onnx_ir.save(model, str(path), external_data=name, size_threshold_bytes=SMALLEST)
    else:
        path.write_bytes(serialized(model))


def serialized(model: Any) -> bytes:
    """An ``onnx_ir`` model without external data as the bytes of a file."""
    found: bytes = onnx_proto(model).SerializeToString(deterministic=True)
    return found


def onnx_proto(model: Any) -> Any:
    """An ``onnx_ir`` model as an ``onnx.ModelProto``."""
    import onnx_ir

    return onnx_ir.serde.serialize_model(model)


def session_of(model: Any, *, external: bool = False) -> Any:
    """A session of ONNX Runtime on the CPU.

    Raises:
        VerificationError: ONNX Runtime does not load it.
    """
    if not external and stored_bytes(model) <= EXTERNAL_ABOVE:
        return open_session(serialized(model))
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "model.onnx"
        write_model(model, path, external=True)
        return open_session(path)


def file_hash(document: Document) -> str:
    """SHA-256 of the file and of its external data."""
    digest = hashlib.sha256()
    for path in (document.path, *sorted(document.data)):
        with path.open("rb") as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
