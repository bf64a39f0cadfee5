"""Looking into model files: each kind is read by a reader that builds and runs nothing."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from graphopt.errors import LoadError
from graphopt.loading.archive import Archive, Member, open_archive
from graphopt.loading.checkpoint import CheckpointFacts, read_checkpoint, read_legacy
from graphopt.loading.facts import FileFacts, TensorFacts, ValueFacts
from graphopt.loading.findings import Finding, Limits, reading
from graphopt.loading.gguf_files import read_gguf
from graphopt.loading.hf_folder import folder_findings, read_config, weight_files
from graphopt.loading.inert import TensorRef
from graphopt.loading.onnx_facts import onnx_metadata, onnx_operators, onnx_tensor, onnx_value
from graphopt.loading.onnx_files import external_findings, read_onnx
from graphopt.loading.pt2 import (
    graph_nodes,
    model_names,
    read_extra_files,
    read_payload,
    read_program,
)
from graphopt.loading.pt2_payload import DTYPE_NAMES, shape_of, view_bytes
from graphopt.loading.safetensors_files import read_header
from graphopt.loading.scan import archive_findings
from graphopt.loading.sniff import sniff
from graphopt.loading.tensors import bytes_of

SIDE_FILE = "graphopt.json"


def inspect_file(path: str | os.PathLike[str], limits: Limits | None = None) -> FileFacts:
    """Find out what a file holds, without loading it or running anything in it.

    A hostile file is described like any other; ``findings`` says why it would be refused.

    Raises:
        LoadError: the file is missing, empty, or of no known kind.
    """
    source, limits = Path(path), limits or Limits.from_env()
    kind = sniff(source, limits)
    facts = FileFacts(str(source), kind, _size(source))
    try:
        with reading(source):
            _READERS[kind](source, facts, limits)
    except LoadError as error:  # what was read so far is shown, with what stopped the reading
        facts.findings += (Finding(error.what, error.where or str(source), error.fix),)
    if facts.graphopt is None and source.is_file():
        facts.graphopt = _side_file(source)
    return facts


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(f.stat().st_size for f in files if f.is_file())


def _side_file(path: Path) -> Any:
    """What graphopt wrote beside ``NAME.onnx``: ``NAME.graphopt.json`` or ``graphopt.json``."""
    for beside in (path.with_suffix(f".{SIDE_FILE}"), path.with_name(SIDE_FILE)):
        if beside.is_file():
            with reading(beside):
                return json.loads(beside.read_text(encoding="utf-8"))
    return None


def _found(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Findings up to and including the error that ends the search, as a finding too."""
    try:
        yield from findings
    except LoadError as error:
        yield Finding(error.what, error.where or "", error.fix)


def _read_archive(path: Path, facts: FileFacts, limits: Limits) -> None:
    with open_archive(path, limits=limits) as archive:
        facts.members = archive.members
        facts.findings = tuple(_found(archive_findings(archive)))
        if archive.kind in ("checkpoint", "torchscript"):
            _fill_checkpoint(facts, read_checkpoint(archive))
        if archive.kind == "pt2":
            _fill_pt2(facts, archive)


def _fill_checkpoint(facts: FileFacts, found: CheckpointFacts) -> None:
    facts.globals = found.globals
    facts.unsafe_globals = found.unsafe if facts.kind != "torchscript" else ()
    facts.metadata["pickle protocol"] = str(found.protocol)
    facts.tensors = tuple(_from_ref(ref) for ref in found.tensors)


def _from_ref(ref: TensorRef) -> TensorFacts:
    sizes = [n for n in ref.sizes if isinstance(n, int) and n >= 0]
    known = ref.dtype is not None and len(sizes) == len(ref.sizes)
    nbytes = bytes_of(math.prod(sizes), ref.dtype) if known and ref.dtype else None
    return TensorFacts(ref.name, str(ref.dtype).removeprefix("torch."), ref.sizes, nbytes)


def _read_legacy(path: Path, facts: FileFacts, limits: Limits) -> None:
    with path.open("rb") as file:
        found = read_legacy(file, str(path), limits)
    facts.findings = found.findings
    _fill_checkpoint(facts, found)


def _fill_pt2(facts: FileFacts, archive: Archive) -> None:
    facts.graphopt = _parsed(read_extra_files(archive).get(SIDE_FILE))
    for name in model_names(archive):
        config = read_payload(archive, name)
        facts.tensors += tuple(_from_payload(n, e) for n, e in sorted(config.items()))
        program = read_program(archive, name)
        graph = program["graph_module"]["graph"]
        signature = program["graph_module"]["signature"]
        facts.inputs += tuple(_values(graph, signature["input_specs"], "user_input"))
        facts.outputs += tuple(_values(graph, signature["output_specs"], "user_output"))
        targets = (node["target"].removeprefix("torch.ops.") for node in graph_nodes(program))
        facts.operators = dict(Counter(facts.operators) + Counter(targets))
        for key in ("torch_version", "schema_version", "opset_version", "range_constraints"):
            facts.metadata[key.replace("_", " ")] = _text(program.get(key))


def _from_payload(name: str, entry: dict[str, Any]) -> TensorFacts:
    meta = entry.get("tensor_meta") or {"dtype": 0, "sizes": []}
    dtype = DTYPE_NAMES.get(meta["dtype"], f"type {meta['dtype']}")
    return TensorFacts(name, dtype, shape_of(meta), view_bytes(meta))


def _values(graph: dict[str, Any], specs: list[Any], kind: str) -> Iterator[ValueFacts]:
    for spec in specs:
        argument = spec.get(kind, {}).get("arg", {})
        if name := argument.get("as_tensor", {}).get("name"):
            meta = graph["tensor_values"][name]
            yield ValueFacts(name, DTYPE_NAMES.get(meta["dtype"], "unknown"), shape_of(meta))
        elif argument:
            yield ValueFacts(_text(next(iter(argument.values()))), next(iter(argument))[3:], ())
        elif constant := spec.get("constant_input"):
            yield ValueFacts(constant["name"], f"constant {_text(constant['value'])}", ())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parsed(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _read_safetensors(path: Path, facts: FileFacts, limits: Limits) -> None:
    tensors, facts.metadata = read_header(path, limits)
    facts.tensors += tuple(TensorFacts(t.name, t.dtype, t.shape, t.end - t.start) for t in tensors)


def _read_onnx(path: Path, facts: FileFacts, limits: Limits) -> None:
    model = read_onnx(path)
    facts.findings = tuple(external_findings(model, path, limits))
    facts.inputs = tuple(map(onnx_value, model.graph.input))
    facts.outputs = tuple(map(onnx_value, model.graph.output))
    facts.operators = dict(Counter(onnx_operators(model)))
    facts.metadata = onnx_metadata(model)
    facts.tensors = tuple(onnx_tensor(t) for t in model.graph.initializer)


def _read_folder(path: Path, facts: FileFacts, limits: Limits) -> None:
    files = (f for f in sorted(path.rglob("*")) if f.is_file())
    facts.members = tuple(
        Member(str(f.relative_to(path)), f.stat().st_size, f.stat().st_size) for f in files
    )
    config = read_config(path)
    facts.findings = tuple(_found(folder_findings(path, config)))
    keys = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version")
    facts.metadata = {key: _text(config[key]) for key in keys if key in config}
    kind, weights = weight_files(path)
    for file in weights:
        found = inspect_file(file, limits)
        facts.tensors += found.tensors
        facts.findings += found.findings
        facts.unsafe_globals += found.unsafe_globals
    facts.metadata["weights"] = kind


def _read_gguf(path: Path, facts: FileFacts, limits: Limits) -> None:
    facts.metadata, facts.tensors = read_gguf(path, limits)


_READERS: dict[str, Callable[[Path, FileFacts, Limits], None]] = {
    **dict.fromkeys(("checkpoint", "torchscript", "pt2", "old_pt2", "zip"), _read_archive),
    "legacy": _read_legacy,
    "safetensors": _read_safetensors,
    "onnx": _read_onnx,
    "huggingface": _read_folder,
    "gguf": _read_gguf,
}
