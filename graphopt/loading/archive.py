"""Zip archives, looked at before anything in them is believed.

torch reads archives with miniz, Python with ``zipfile``. What the two could read differently
(names that differ in case only, members listed twice, headers that disagree, bytes before or
after the archive) is refused, so that what was scanned is what gets loaded.
"""

from __future__ import annotations

import copy
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from graphopt.loading.findings import Finding, Limits, env_name, reading

ZIP_MAGIC = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_END_RECORD = struct.Struct("<4s4H2IH")
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_UNIX_LINK = 0o120000


@dataclass(frozen=True)
class Member:
    """One file of an archive; sizes in bytes."""

    name: str
    size: int
    packed: int


@dataclass
class Archive:
    """An open zip file. ``where`` names it in messages."""

    where: str
    file: BinaryIO
    zip: zipfile.ZipFile
    limits: Limits

    @cached_property
    def members(self) -> tuple[Member, ...]:
        infos = self.zip.infolist()
        return tuple(Member(i.filename, i.file_size, i.compress_size) for i in infos)

    @cached_property
    def root(self) -> str:
        """The folder that all members share, ``name/``; torch takes it from the first member."""
        return self.members[0].name.split("/")[0] + "/" if self.members else ""

    @cached_property
    def records(self) -> dict[str, Member]:
        """Members by the name torch uses: relative to the root."""
        return {m.name.removeprefix(self.root): m for m in self.members}

    @cached_property
    def kind(self) -> str:
        """``pt2``, ``torchscript``, ``checkpoint`` (from torch.save), ``old_pt2`` or ``zip``."""
        if "archive_format" in self.records:
            return "pt2"
        if "constants.pkl" in self.records:
            return "torchscript"
        if "data.pkl" in self.records:
            return "checkpoint"
        names = {m.name for m in self.members}
        return "old_pt2" if "serialized_exported_program.json" in names else "zip"

    def read(self, record: str) -> bytes:
        """The bytes of a record that is parsed in memory; at most ``limits.text_bytes``."""
        where = f"{self.where}, member {record}"
        with reading(where):
            info = copy.copy(self.zip.getinfo(self.records[record].name))
            if info.file_size > self.limits.text_bytes:
                raise _over(f"the part has {info.file_size} bytes", "text_bytes", where).error()
            if info.CRC == 0:  # torch.serialization.set_crc32_options(False) writes 0 for all
                del info.CRC
            return self.zip.open(info).read()


@contextmanager
def open_archive(
    file: str | os.PathLike[str] | BinaryIO, where: str = "", limits: Limits | None = None
) -> Iterator[Archive]:
    """Open a zip file, or one that lies inside an open file object, without unpacking anything."""
    if isinstance(file, str | os.PathLike):
        where = os.fspath(file)
        with (
            reading(where),
            Path(file).open("rb") as handle,
            open_archive(handle, where, limits) as archive,
        ):
            yield archive
        return
    with reading(where):
        opened = zipfile.ZipFile(file)
    with opened:
        yield Archive(where, file, opened, limits or Limits.from_env())


def structure_findings(archive: Archive) -> Iterator[Finding]:
    """What is wrong with the archive as an archive, whatever its members hold."""
    if not archive.members:
        yield Finding("the archive is empty", archive.where)
        return
    if len(archive.members) > archive.limits.members:
        yield _over(f"the archive has {len(archive.members)} members", "members", archive.where)
        return
    yield from _size_findings(archive)
    yield from _name_findings(archive)
    yield from _layout_findings(archive)


def _over(what: str, limit: str, where: str) -> Finding:
    return Finding(
        f"{what}, over the limit", where, f"if you trust the file, raise {env_name(limit)}"
    )


def _size_findings(archive: Archive) -> Iterator[Finding]:
    limits, where = archive.limits, archive.where
    total = sum(m.size for m in archive.members)
    packed = sum(m.packed for m in archive.members)
    if total > limits.total_bytes:
        yield _over(f"the archive unpacks to {total} bytes", "total_bytes", where)
    if total > limits.ratio * max(packed, 1) and total > 1024:
        yield _over(
            f"the archive unpacks to {total / max(packed, 1):.0f}x its size", "ratio", where
        )
    for m in archive.members:
        if m.size > limits.ratio * max(m.packed, 1) and m.size > 1024:
            what = f"the member unpacks to {m.size / max(m.packed, 1):.0f}x its size"
            yield _over(what, "ratio", f"{where}, member {m.name}")


def _name_findings(archive: Archive) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for info in archive.zip.infolist():
        where = f"{archive.where}, member {info.orig_filename!r}"
        reason = _bad_name(info)
        if reason:
            yield Finding(reason, where)
        folded = info.filename.casefold()
        if folded in seen:
            yield Finding(f"the name is there twice (also as {seen[folded]!r})", where)
        seen[folded] = info.filename
        if info.flag_bits & 0x1:
            yield Finding("the member is encrypted", where)
        if info.compress_type not in _METHODS:
            yield Finding(f"unknown compression method {info.compress_type}", where)
        if info.external_attr >> 16 & 0o170000 == _UNIX_LINK:
            yield Finding("the member is a symbolic link", where)


def _bad_name(info: zipfile.ZipInfo) -> str | None:
    name = info.orig_filename
    parts = PurePosixPath(name).parts
    if not parts or any(ord(c) < 32 for c in name) or "\\" in name:
        return "the member's name holds control characters or backslashes, or is empty"
    if ".." in parts:
        return "the member's name leads out of the archive (..)"
    if name.startswith("/") or name[1:2] == ":":
        return "the member's name is an absolute path"
    return None


def _layout_findings(archive: Archive) -> Iterator[Finding]:
    """Members must lie one after the other, as listed, and fill the file from its first byte."""
    end = 0
    for info in sorted(archive.zip.infolist(), key=lambda i: i.header_offset):
        where = f"{archive.where}, member {info.filename}"
        if info.header_offset < end:
            yield Finding("the member overlaps another", where)
        archive.file.seek(info.header_offset)
        header = archive.file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != ZIP_MAGIC:
            yield Finding("the member's header is missing", where)
            return
        _, _, flags, method, _, _, _, packed, size, name_bytes, extra = _LOCAL_HEADER.unpack(header)
        name = archive.file.read(name_bytes).decode(
            "utf-8" if flags & 0x800 else "cp437", "replace"
        )
        sizes_differ = (
            not flags & 0x8
            and 0xFFFFFFFF not in (packed, size)
            and ((packed, size) != (info.compress_size, info.file_size))
        )
        if (name, method) != (info.orig_filename, info.compress_type) or sizes_differ:
            yield Finding("the member's two headers disagree", where)
        end = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra + info.compress_size
    yield from _edge_findings(archive, end)


def _edge_findings(archive: Archive, end: int) -> Iterator[Finding]:
    if min(i.header_offset for i in archive.zip.infolist()) != 0:
        yield Finding("bytes stand before the archive", archive.where)
    if end > archive.zip.start_dir:
        yield Finding("a member runs into the archive's directory", archive.where)
    archive.file.seek(-_END_RECORD.size, os.SEEK_END)
    signature, *_, comment = _END_RECORD.unpack(archive.file.read(_END_RECORD.size))
    if signature != b"PK\x05\x06" or comment:
        yield Finding("bytes stand behind the archive", archive.where)


def root_findings(archive: Archive) -> Iterator[Finding]:
    """torch archives keep every member in one folder; another folder would be read by no check."""
    for m in archive.members:
        if not m.name.startswith(archive.root):
            what = f"the member lies outside the archive's folder {archive.root}"
            yield Finding(what, f"{archive.where}, member {m.name}")
