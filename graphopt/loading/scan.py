"""One scan for every kind of archive, to be run before anything opens it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from graphopt.loading.archive import (
    ZIP_MAGIC,
    Archive,
    Member,
    open_archive,
    root_findings,
    structure_findings,
)
from graphopt.loading.checkpoint import read_checkpoint
from graphopt.loading.findings import Finding, Limits, refuse
from graphopt.loading.pt2 import pt2_findings
from graphopt.loading.torchscript import torchscript_findings


@dataclass(frozen=True)
class ArchiveScan:
    """An archive in which nothing dangerous was found.

    Attributes:
        path: the file.
        kind: ``pt2``, ``torchscript``, ``checkpoint``, ``old_pt2`` or ``zip``.
        members: its files, in order, with unpacked and packed bytes.
        total_bytes: unpacked bytes of all members.
    """

    path: str
    kind: str
    members: tuple[Member, ...]
    total_bytes: int


def scan_archive(path: str | os.PathLike[str], limits: Limits | None = None) -> ArchiveScan:
    """Scan a ``.pt2``, ``.pt`` or ``.zip`` file without unpacking or running anything.

    A checkpoint may name classes that torch's weights-only reader refuses: whether to load it all
    the same is for :func:`graphopt.loading.load_model` to decide. A ``.pt2`` may not.

    Raises:
        LoadError: the file is no zip archive, is damaged, or is dangerous: names that lead
            elsewhere or collide, members that overlap, disagreeing headers, ratios or sizes over
            ``limits``, storages smaller than they claim, archives within archives; in a ``.pt2``
            pickles, native code, and a program that is more than a graph of operators.
    """
    with open_archive(path, limits=limits) as archive:
        refuse(archive_findings(archive))
        total = sum(m.size for m in archive.members)
        return ArchiveScan(os.fspath(path), archive.kind, archive.members, total)


def archive_findings(archive: Archive) -> Iterator[Finding]:
    """Everything that :func:`scan_archive` refuses."""
    yield from _SCANS.get(archive.kind, _plain_findings)(archive)


def _checkpoint_findings(archive: Archive) -> Iterator[Finding]:
    yield from read_checkpoint(archive).findings


def _plain_findings(archive: Archive) -> Iterator[Finding]:
    structure = list(structure_findings(archive))
    yield from structure
    for member in () if structure else archive.members:
        with archive.zip.open(member.name) as opened:
            if opened.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
                where = f"{archive.where}, member {member.name}"
                yield Finding("the member is itself an archive", where, "unpack it first")


def _script_findings(archive: Archive) -> Iterator[Finding]:
    structure = [*structure_findings(archive), *root_findings(archive)]
    yield from structure or torchscript_findings(archive)


_SCANS: dict[str, Callable[[Archive], Iterator[Finding]]] = {
    "pt2": pt2_findings,
    "checkpoint": _checkpoint_findings,
    "torchscript": _script_findings,
}
