"""Checkpoints of ``torch.save``: looked at first, then loaded by torch's weights-only reader."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._weights_only_unpickler import _get_allowed_globals, _get_user_allowed_globals

from graphopt.errors import LoadError
from graphopt.loading.archive import Archive, open_archive, root_findings, structure_findings
from graphopt.loading.findings import Finding, Limits, printable, reading, refuse
from graphopt.loading.inert import PickleFacts, Storage, TensorRef, read_pickle, tensor_refs
from graphopt.loading.tensors import bytes_of, check_tensors

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_SAFE_PROTOCOL = 2  # the newest that torch's weights-only reader knows


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint holds, found without running any of it.

    Attributes:
        globals: every class and function its pickle names.
        unsafe: those of them that torch's weights-only reader refuses.
        tensors: the tensors it would rebuild.
        protocol: the pickle protocol it is written in.
        findings: why it must not be loaded at all.
    """

    globals: tuple[str, ...] = ()
    unsafe: tuple[str, ...] = ()
    tensors: tuple[TensorRef, ...] = ()
    protocol: int = 0
    findings: tuple[Finding, ...] = field(default=())


def read_checkpoint(archive: Archive, folder: str = "data") -> CheckpointFacts:
    """Look at a zipped checkpoint: its pickle, and whether each storage has the bytes it claims.

    The pickle is the record ``FOLDER.pkl``, the storages lie in ``FOLDER/``.
    """
    where = archive.where
    findings = [*structure_findings(archive), *root_findings(archive)]
    if findings:
        return CheckpointFacts(findings=tuple(findings))
    with reading(where):
        facts = read_pickle(io.BytesIO(archive.read(f"{folder}.pkl")))
    sizes = {name: m.size for name, m in archive.records.items()}
    for storage in facts.storages:
        held = sizes.get(f"{folder}/{storage.key}")
        findings += _storage_findings(storage, held, where)
    return _facts(facts, findings, where)


def read_legacy(stream: BinaryIO, where: str, limits: Limits) -> CheckpointFacts:
    """Look at a checkpoint from before torch 1.6: pickles in a row, then the storages' bytes."""
    bounded = _Bounded(stream, limits.text_bytes)
    with reading(where):
        first = read_pickle(bounded)
        if first.value != LEGACY_MAGIC:
            return _facts(first, [_bare_pickle(where)], where)
        for _ in ("protocol", "system"):
            read_pickle(bounded)
        facts = read_pickle(bounded)
        order = read_pickle(bounded).value
        held = _legacy_sizes(stream, order, {s.key: s for s in facts.storages})
    findings: list[Finding] = []
    for storage in facts.storages:
        findings += _storage_findings(storage, held.get(storage.key), where)
    return _facts(facts, findings, where)


def _bare_pickle(where: str) -> Finding:
    return Finding(
        "the file is a bare pickle, not a checkpoint written by torch.save",
        where,
        "save the weights with torch.save(model.state_dict(), path)",
    )


class _Bounded:
    """A stream that refuses reads larger than what is parsed in memory."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self.stream, self.limit = stream, limit

    def read(self, size: int) -> bytes:
        if size > self.limit:
            raise ValueError(f"a pickled value claims {size} bytes")
        return self.stream.read(size)

    def readline(self) -> bytes:
        return self.stream.readline(self.limit)


def _legacy_sizes(stream: BinaryIO, order: Any, storages: dict[str, Storage]) -> dict[str, int]:
    """Bytes the file really holds for each storage, in the order it lists them."""
    end = os.fstat(stream.fileno()).st_size
    held: dict[str, int] = {}
    for key in map(str, order):
        numel = int.from_bytes(stream.read(8), "little", signed=True)
        dtype = storages[key].dtype if key in storages else None
        nbytes = max(numel, 0) * (dtype.itemsize if dtype else 1)
        held[key] = max(0, min(nbytes, end - stream.tell()))
        stream.seek(nbytes, os.SEEK_CUR)
    return held


def _storage_findings(storage: Storage, held: int | None, where: str) -> Iterator[Finding]:
    at = f"{where}, storage {storage.key}"
    if storage.nbytes is None:
        yield Finding(f"the storage claims {storage.numel!r} elements of {storage.dtype}", at)
    elif held is None:
        yield Finding("a tensor refers to a storage that the file does not hold", at)
    elif held != storage.nbytes:
        what = f"the storage claims {storage.nbytes} bytes, the file holds {held}"
        yield Finding(what, at, "get an undamaged copy of the file")


def _facts(facts: PickleFacts, findings: list[Finding], where: str) -> CheckpointFacts:
    refs = tuple(tensor_refs(facts.value))
    findings += [f for ref in refs for f in _tensor_findings(ref, where)]
    findings += [Finding(f"unknown reference {ref!r:.80}", where) for ref in facts.foreign]
    allowed = _get_allowed_globals().keys() | _get_user_allowed_globals().keys()
    wanted = {name.replace("torch.tensor.", "torch._tensor.", 1) for name in facts.globals}
    return CheckpointFacts(
        globals=tuple(sorted(facts.globals)),
        unsafe=tuple(sorted(wanted - allowed)),
        tensors=refs,
        protocol=facts.protocol,
        findings=tuple(dict.fromkeys(findings)),
    )


def _tensor_findings(ref: TensorRef, where: str) -> Iterator[Finding]:
    at, nbytes = f"{where}, tensor {ref.name}", ref.storage.nbytes
    if ref.elements_needed is None or ref.dtype is None:
        what = f"shape {ref.size}, strides {ref.stride}, offset {ref.offset} make no tensor"
        yield Finding(what, at)
    elif nbytes is not None and (needed := bytes_of(ref.elements_needed, ref.dtype)) > nbytes:
        what = f"shape {ref.size} needs {needed} bytes of a storage that holds {nbytes}"
        yield Finding(what, at)


def load_checkpoint(path: Path, *, trust_pickle: bool, limits: Limits) -> Any:
    """The object in a checkpoint, its tensors on the CPU.

    Whether the full pickle reader is needed is decided from the scan, before anything is loaded;
    a failure of the weights-only reader is an error, never a reason to try the other.

    Raises:
        LoadError: the file is damaged or hostile, or needs ``trust_pickle`` and does not have it.
    """
    with reading(path), path.open("rb") as file:
        facts = scan_checkpoint(file, str(path), limits)
        refuse(facts.findings)
        full = needs_trust(facts)
        if full and not trust_pickle:
            raise pickle_refusal(facts, str(path))
        file.seek(0)
        with torch.sparse.check_sparse_tensor_invariants(True), importable_from_cwd(full):
            loaded = torch.load(file, map_location="cpu", weights_only=not full)
    check_tensors(loaded, str(path))
    return loaded


def require_weights_only(path: Path, limits: Limits, fix: str) -> None:
    """Check, without loading it, that the weights-only reader takes the checkpoint at ``path``.

    Raises:
        LoadError: it is damaged or hostile, or names classes that the reader refuses.
    """
    with reading(path), path.open("rb") as file:
        facts = scan_checkpoint(file, str(path), limits)
    refuse(facts.findings)
    if needs_trust(facts):
        raise pickle_refusal(facts, str(path), fix)


def needs_trust(facts: CheckpointFacts) -> bool:
    """Whether only the full pickle reader, which runs code, takes the checkpoint."""
    return bool(facts.unsafe) or facts.protocol > _SAFE_PROTOCOL


def scan_checkpoint(file: BinaryIO, where: str, limits: Limits) -> CheckpointFacts:
    """Look at a checkpoint of either format, from the start of ``file``."""
    if file.read(2) == b"PK":
        with open_archive(file, where, limits) as archive:
            return read_checkpoint(archive)
    file.seek(0)
    return read_legacy(file, where, limits)


_TWO_WAYS = (
    "where the model was made, torch.save(model.state_dict(), 'weights.pt'), then "
    "--arch package.module:factory; or, only if you trust whoever made the file, "
    "--trust-pickle, which lets it run any code"
)


def pickle_refusal(facts: CheckpointFacts, where: str, fix: str = _TWO_WAYS) -> LoadError:
    """Why the weights-only reader will not do, and the ways on."""
    if facts.unsafe:
        listed = printable(", ".join(facts.unsafe[:8])) + (", ..." if len(facts.unsafe) > 8 else "")
        what = f"loading this file would import and may run: {listed}"
    else:
        what = f"the file uses pickle protocol {facts.protocol}, newer than the safe reader knows"
    return LoadError(what, where=where, fix=fix)


@contextmanager
def importable_from_cwd(active: bool = True) -> Iterator[None]:
    """Let modules of the working folder be imported, as ``python -m`` does."""
    added = str(Path.cwd())
    if active:
        sys.path.insert(0, added)
    try:
        yield
    finally:
        if active and added in sys.path:
            sys.path.remove(added)
