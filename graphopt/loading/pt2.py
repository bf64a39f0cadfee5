"""``.pt2`` archives of ``torch.export.save``: scanned member by member, then loaded by torch.

Of the members that ``torch.export.load`` reads, four kinds are pickles that it runs without asking
(weights and constants whose config says ``use_pickle``, native and opaque objects, weights in the
legacy layout, and example inputs once the weights-only reader fails) and one is native code
(AOTInductor). A program needs none of them: they are refused, and so is every member of unknown
kind. The program itself is checked by :mod:`graphopt.loading.pt2_program`.
"""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import LoadError
from graphopt.loading.archive import Archive, open_archive, root_findings, structure_findings
from graphopt.loading.checkpoint import read_checkpoint
from graphopt.loading.findings import Finding, Limits, reading, refuse
from graphopt.loading.operators import unregistered
from graphopt.loading.pt2_classes import register_classes
from graphopt.loading.pt2_payload import payload_findings, read_config
from graphopt.loading.pt2_program import program_findings
from graphopt.loading.tensors import check_tensors

_PICKLE = "a pickled object, which runs code when it is loaded"
_MEMBERS: tuple[tuple[str, str | None], ...] = (
    (r"archive_format|archive_version|byteorder|version", None),
    (r"\.data/(version|serialization_id)|\.format_version|\.storage_alignment", None),
    (r"models/[^/]+\.json", None),
    (r"data/weights/(weight_\d+|[^/]+_weights_config\.json)", None),
    (r"data/constants/(tensor_\d+|[^/]+_constants_config\.json)", None),
    (r"data/sample_inputs/[^/]+\.pt", None),
    (r"extra/.+", None),
    (r"data/aotinductor/.*|.*\.(so|dll|dylib|o|cubin|hsaco)", "compiled native code"),
    (r"data/constants/(custom|opaque)_obj_.*", _PICKLE),
    (r"data/(weights|constants)/.*\.pt|.*\.pkl", _PICKLE),
    (r".*", "of a kind that no exported program has"),
)
_EXTRA = "extra/"
_MODEL = re.compile(r"models/([^/]+)\.json")


def pt2_findings(archive: Archive) -> Iterator[Finding]:
    """Everything in a ``.pt2`` archive that speaks against loading it."""
    structure = [*structure_findings(archive), *root_findings(archive)]
    yield from structure
    if structure:
        return
    for record in archive.records:
        if reason := member_reason(record):
            fix = "export the model again with torch.export.save, without it"
            yield Finding(f"the member is {reason}", f"{archive.where}, member {record}", fix)
    for name in model_names(archive):
        for record, prefix in _configs(name):
            yield from payload_findings(archive, record, prefix)
        yield from program_findings(read_program(archive, name), f"{archive.where}, {name}.json")
        yield from _sample_findings(archive, name)


def member_reason(record: str) -> str | None:
    """What a member is, where it is one that must not be there."""
    return next(reason for pattern, reason in _MEMBERS if re.fullmatch(pattern, record, re.I))


def model_names(archive: Archive) -> list[str]:
    """The programs in an archive; ``torch.export.save`` writes one, called ``model``."""
    return [m[1] for m in map(_MODEL.fullmatch, archive.records) if m]


def _configs(name: str) -> tuple[tuple[str, str], ...]:
    """The payload configs of a program, and what their files' names begin with."""
    return (
        (f"data/weights/{name}_weights_config.json", "weight"),
        (f"data/constants/{name}_constants_config.json", "tensor"),
    )


def read_payload(archive: Archive, name: str) -> dict[str, dict[str, Any]]:
    """What the archive says of a program's weights and constants, by name."""
    return {k: v for record, _ in _configs(name) for k, v in read_config(archive, record).items()}


def read_program(archive: Archive, name: str = "model") -> dict[str, Any]:
    """The program of that name, as parsed JSON."""
    with reading(f"{archive.where}, program {name}"):
        program = json.loads(archive.read(f"models/{name}.json"))
        if not isinstance(program, dict) or "graph_module" not in program:
            raise ValueError("it is no exported program")
        return program


def graph_nodes(program: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every node of a program, subgraphs included."""
    stack: list[Any] = [program["graph_module"]["graph"]]
    while stack:
        item = stack.pop()
        if isinstance(item, dict) and isinstance(item.get("target"), str):
            yield item
        if isinstance(item, dict):
            stack.extend(v for k, v in item.items() if k != "metadata")
        elif isinstance(item, list):
            stack.extend(reversed(item))


def _sample_findings(archive: Archive, name: str) -> Iterator[Finding]:
    """Example inputs: a checkpoint in the archive that the weights-only reader must accept.

    torch loads them without that reader when it fails, so it must be seen to succeed.
    """
    record = f"data/sample_inputs/{name}.pt"
    where = f"{archive.where}, member {record}"
    if record not in archive.records:
        yield Finding("the archive has no record of example inputs", where)
        return
    data = archive.read(record)
    if not data:
        return
    with open_archive(io.BytesIO(data), where, archive.limits) as nested:
        facts = read_checkpoint(nested)
    fix = "save the program again with plain tensors as example inputs"
    yield from facts.findings
    for unsafe in facts.unsafe:
        yield Finding(f"the example inputs would import and may run {unsafe}", where, fix)
    if not facts.findings and not facts.unsafe:
        try:
            torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except Exception as error:
            yield Finding(f"the example inputs need a full unpickler: {error!s:.200}", where, fix)


def read_extra_files(archive: Archive) -> dict[str, str]:
    """The texts that were saved beside the program, by name."""
    records = [r for r in archive.records if r.startswith(_EXTRA)]
    with reading(archive.where):
        return {r.removeprefix(_EXTRA): archive.read(r).decode() for r in records}


def load_pt2(path: Path, limits: Limits) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """Load a ``.pt2`` file in which the scan found nothing; weights stay on their device.

    Returns:
        The program, and the texts saved beside it.

    Raises:
        LoadError: the file is damaged or hostile, or names operators that no imported package
            registers.
    """
    with reading(path), path.open("rb") as file:
        with open_archive(file, str(path), limits) as archive:
            refuse(pt2_findings(archive))
            if "model" not in model_names(archive):
                raise LoadError("the archive holds no program called model", where=str(path))
            _register_operators(read_program(archive), path)
            register_classes(read_program(archive), str(path))
            extra_files = read_extra_files(archive)
        file.seek(0)
        program = torch.export.load(file)
    check_tensors([program.state_dict, program.constants, program.example_inputs], str(path))
    return program, extra_files


def _register_operators(program: dict[str, Any], path: Path) -> None:
    """Import graphopt's own operators where the program calls them, and name missing ones."""
    targets = {node["target"] for node in graph_nodes(program)}
    if any(t.startswith("torch.ops.graphopt.") for t in targets):
        importlib.import_module("graphopt.kernels")
    if missing := unregistered(targets):
        raise LoadError(
            f"the program calls operators that are not registered: {', '.join(missing[:8])}",
            where=str(path),
            fix="import the package that defines them before loading the file",
        )
