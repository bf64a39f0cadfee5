"""Zip files that lie about their members are refused by every reader."""

from __future__ import annotations

import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile_files import rewritten, write_zip

from graphopt.errors import GraphoptError, LoadError
from graphopt.loading import Limits, inspect_file, load_model, scan_archive

ZEROS = bytes(200_000)


def plain(path: Path) -> Path:
    return write_zip(path, {"m/a": b"one", "m/b": b"two"})


def member_called(name: str) -> Callable[[Path], Path]:
    return lambda path: write_zip(path, {"m/a": b"one", name: b"two"})


def twice(first: str, second: str) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
            warnings.simplefilter("ignore")
            archive.writestr(first, b"one")
            archive.writestr(second, b"two")
        return path

    return build


def bomb(path: Path) -> Path:
    return write_zip(path, {"m/a": ZEROS}, zipfile.ZIP_DEFLATED)


def one_of_many_bombs(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/large", bytes(range(256)) * 4000)
        archive.writestr("m/bomb", ZEROS, zipfile.ZIP_DEFLATED)
    return path


def edited_info(edit: Callable[[zipfile.ZipInfo], None]) -> Callable[[Path], Path]:
    """An archive whose directory says something else of the second member."""

    def build(path: Path) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/a", b"one")
            archive.writestr("m/b", b"two")
            edit(archive.filelist[1])
        return path

    return build


def encrypt(info: zipfile.ZipInfo) -> None:
    info.flag_bits |= 1


def link(info: zipfile.ZipInfo) -> None:
    info.external_attr = (stat.S_IFLNK | 0o777) << 16


def overlap(info: zipfile.ZipInfo) -> None:
    info.header_offset = 0


def larger(info: zipfile.ZipInfo) -> None:
    info.file_size = 30


def changed_bytes(edit: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        plain(path).write_bytes(edit(path.read_bytes()))
        return path

    return build


def bzip2(path: Path) -> Path:
    return write_zip(path, {"m/a": b"one"}, zipfile.ZIP_BZIP2)


def nested(path: Path) -> Path:
    inner = plain(path.with_name("inner.zip"))
    return write_zip(path, {"m/a": b"one", "m/inner": inner.read_bytes()})


def empty(path: Path) -> Path:
    return write_zip(path, {})


HOSTILE = {
    "up": (member_called("m/../../etc"), "leads out of the archive"),
    "absolute": (member_called("/etc/passwd"), "absolute path"),
    "drive": (member_called("C:/windows"), "absolute path"),
    "backslash": (member_called("m\\..\\b"), "backslashes"),
    "control": (member_called("m/\x1b[2Jb"), "control characters"),
    "duplicate": (twice("m/a", "m/a"), "is there twice"),
    "short duplicate": (twice("a", "a"), "is there twice"),
    "case": (twice("m/model", "m/MODEL"), "is there twice"),
    "bomb": (bomb, "its size, over the limit"),
    "one bomb": (one_of_many_bombs, "its size, over the limit"),
    "encrypted": (edited_info(encrypt), "the member is encrypted"),
    "link": (edited_info(link), "symbolic link"),
    "overlap": (edited_info(overlap), "overlaps another"),
    "header": (edited_info(larger), "two headers disagree"),
    "name": (changed_bytes(lambda b: b.replace(b"m/b", b"m/c", 1)), "two headers disagree"),
    "before": (changed_bytes(lambda b: b"#!/bin/sh\n" + b), "before the archive"),
    "behind": (changed_bytes(lambda b: b + b"tail"), "behind the archive"),
    "second end": (changed_bytes(lambda b: b + b[-22:]), "damaged|header|behind"),
    "comment": (changed_bytes(lambda b: b[:-2] + b"\x02\x00hi"), "behind the archive"),
    "bzip2": (bzip2, "unknown compression method"),
    "nested": (nested, "itself an archive"),
    "empty": (empty, "archive is empty"),
}


@pytest.mark.parametrize(("build", "reason"), HOSTILE.values(), ids=list(HOSTILE))
def test_refused(build: Callable[[Path], Path], reason: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=reason) as refusal:
        scan_archive(build(tmp_path / "a.zip"))
    assert str(refusal.value).replace("\n", "").isprintable()


def test_plain_archive_passes(tmp_path: Path) -> None:
    scan = scan_archive(plain(tmp_path / "a.zip"))
    assert scan.kind == "zip" and scan.total_bytes == 6
    assert [m.name for m in scan.members] == ["m/a", "m/b"]
    with pytest.raises(LoadError, match="holds no model"):
        load_model(tmp_path / "a.zip")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": True}])
def test_what_torch_writes_passes(options: dict, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(1000, 1000)}, path, **options)
    assert scan_archive(path).kind == "checkpoint"


def test_checkpoint_without_checksums_passes(tmp_path: Path) -> None:
    """``set_crc32_options(False)`` writes 0 for every checksum."""
    path = tmp_path / "m.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert scan_archive(path).kind == "checkpoint"


def test_member_outside_the_root_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(3)}, path)
    contents = _members(path) | {"other/data.pkl": b"x"}
    with pytest.raises(LoadError, match="outside the archive's folder m/"):
        scan_archive(write_zip(path, contents))


def _members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_second_root_of_a_program_is_refused(clean_pt2: Path, tmp_path: Path) -> None:
    path = rewritten(clean_pt2, tmp_path / "two.pt2", lambda contents: None)
    contents = _members(path) | {"other/models/model.json": b"{}"}
    with pytest.raises(LoadError, match="outside the archive's folder tiny/"):
        load_model(write_zip(path, contents))


def test_colliding_record_of_a_program_is_refused(clean_pt2: Path, tmp_path: Path) -> None:
    """torch finds records without regard to case, so a twin could stand in for what was scanned."""

    def edit(contents: dict[str, bytes]) -> None:
        contents["MODELS/model.json"] = contents["models/model.json"]

    with pytest.raises(LoadError, match="is there twice"):
        load_model(rewritten(clean_pt2, tmp_path / "twin.pt2", edit))


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("ratio", 0.5, "x its size, over the limit"),
        ("total_bytes", 5000, "unpacks to .* bytes, over the limit"),
        ("members", 1, "members, over the limit"),
        ("text_bytes", 20, "the part has .* bytes, over the limit"),
    ],
)
def test_limits(
    limit: str,
    value: float,
    reason: str,
    clean_pt2: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each limit holds as an argument and as a variable, and the refusal names the variable."""
    with pytest.raises(LoadError, match=reason) as refusal:
        scan_archive(clean_pt2, Limits(**{limit: value}))
    variable = f"GRAPHOPT_MAX_{limit.upper()}"
    assert variable in (refusal.value.fix or "")
    scan_archive(clean_pt2)
    monkeypatch.setenv(variable, str(value))
    with pytest.raises(LoadError, match=reason):
        load_model(clean_pt2)


@pytest.mark.parametrize("text", ["many", "-1", "0", "nan"])
def test_limit_that_is_no_number(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHOPT_MAX_RATIO", text)
    with pytest.raises(GraphoptError, match="not a positive number"):
        scan_archive(plain(tmp_path / "a.zip"))


def test_bomb_is_not_unpacked_to_be_inspected(tmp_path: Path) -> None:
    facts = inspect_file(bomb(tmp_path / "a.zip"))
    assert facts.members[0].size == len(ZEROS)
    assert any("its size" in finding.what for finding in facts.findings)
