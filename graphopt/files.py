"""Files written whole or not at all, and the per-user cache folder."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphopt.errors import GraphoptError


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to; what lies there replaces ``target`` when the block succeeds.

    The path has the final file name and stands in a hidden temporary folder beside ``target``, so
    that side files written next to it (the external data of an ONNX model, which the model names)
    already carry their final names. Afterwards each file is flushed to disk and renamed into
    place, the target last; a folder written at the yielded path becomes the target folder. When
    the block raises, or a rename fails, nothing new stays and replaced files are put back. A link
    at ``target`` is followed. A power cut between the renames of a set can leave new side files
    with the old target: give side files a name of their own where that matters.

    Raises:
        GraphoptError: the parent folder is missing, the block wrote nothing at the path, or the
            target is a folder that is not empty.
    """
    final = Path(os.path.realpath(target))
    if not final.parent.is_dir():
        raise GraphoptError(
            "the folder to write to does not exist",
            where=str(final.parent),
            fix=f"mkdir -p {final.parent}",
        )
    try:
        staging = Path(tempfile.mkdtemp(prefix=".graphopt-tmp-", dir=final.parent))
    except OSError as error:
        raise GraphoptError(
            f"the folder cannot be written to: {error.strerror}", where=str(final.parent)
        ) from error
    try:
        yield staging / final.name
        if not (staging / final.name).exists():
            raise GraphoptError("nothing was written", where=str(final))
        _move_into_place(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_into_place(staging: Path, final: Path) -> None:
    """Rename every entry of ``staging`` beside ``final``, ``final`` itself last, or undo it all."""
    entries = sorted(staging.iterdir(), key=lambda entry: entry.name == final.name)
    for entry in entries:
        _flush(entry)
    undo: list[tuple[Path, Path | None]] = []
    try:
        for entry in entries:
            step = _replace(entry, final.parent / entry.name, staging)
            undo.append(step)
    except BaseException:
        for placed, backup in reversed(undo):
            _discard(placed) if backup is None else backup.replace(placed)
        raise
    _flush_folder(final.parent)


def _replace(entry: Path, place: Path, staging: Path) -> tuple[Path, Path | None]:
    """Move ``entry`` to ``place``; return the place and, where a file stood, its kept copy.

    A file that is replaced hands its permissions on.
    """
    backup = None
    if place.is_dir() and (not entry.is_dir() or any(place.iterdir())):
        raise GraphoptError(
            "a folder stands where the file is to be written", where=str(place), fix="remove it"
        )
    if place.is_file():
        backup = Path(tempfile.mkdtemp(dir=staging)) / place.name
        try:
            os.link(place, backup)
        except OSError:
            shutil.copy2(place, backup)
        shutil.copymode(place, entry)
    entry.replace(place)
    return place, backup


def _discard(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file in files:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the renames durable; only POSIX lets a folder be opened for that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_dir(name: str = "") -> Path:
    """The user's graphopt cache folder, or its subfolder ``name``; created on demand, mode 0700.

    Stands under ``XDG_CACHE_HOME`` where that is an absolute path (XDG Base Directory
    Specification), else under the platform's cache folder.

    Raises:
        GraphoptError: the folder is a link, is not the user's own, or others may write to it.
    """
    folder = _cache_home() / "graphopt"
    _private_folder(folder)
    if name:
        folder = folder / name
        _private_folder(folder)
    return folder


def _cache_home() -> Path:
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if configured.is_absolute():
        return configured
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path.home() / ".cache"


def _private_folder(folder: Path) -> None:
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise _cache_error(f"the cache folder cannot be made: {error.strerror}", folder) from error
    if not stat.S_ISDIR(facts.st_mode):
        raise _cache_error("the cache folder is a link", folder)
    if os.name != "posix":
        return
    if facts.st_uid != os.geteuid():
        raise _cache_error(f"the cache folder belongs to user id {facts.st_uid}", folder)
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _cache_error("other users may write to the cache folder", folder)
    folder.chmod(0o700)


def _cache_error(what: str, folder: Path) -> GraphoptError:
    return GraphoptError(
        what, where=str(folder), fix=f"remove {folder}, or set XDG_CACHE_HOME to a folder of yours"
    )
