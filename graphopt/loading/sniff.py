"""What a file is, by its first bytes; its name is only believed where the content says nothing."""

from __future__ import annotations

import tarfile
from pathlib import Path

from graphopt.errors import LoadError
from graphopt.loading.archive import ZIP_MAGIC, open_archive
from graphopt.loading.findings import Limits, reading

_FOREIGN = {
    b"\x7fELF": "a native program or library",
    b"MZ": "a native program or library",
    b"\x89HDF": "an HDF5 file (Keras?)",
    b"\x1f\x8b": "a gzip file: unpack it first",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself (git lfs pull)",
    b"<!DOCTYPE": "a web page: the download went wrong",
    b"<html": "a web page: the download went wrong",
}


def sniff(path: Path, limits: Limits) -> str:
    """The kind of a model file or folder.

    Returns:
        ``huggingface`` (a folder), ``gguf``, ``pt2``, ``old_pt2``, ``torchscript``,
        ``checkpoint``, ``legacy`` (a checkpoint from before torch 1.6), ``zip``, ``safetensors``
        or ``onnx``.

    Raises:
        LoadError: there is no such file, or it is none of these.
    """
    with reading(path):
        if path.is_dir():
            return "huggingface"
        if not path.is_file():
            raise LoadError("there is no such file", where=str(path), fix="check the path")
        with path.open("rb") as file:
            head = file.read(64)
    if not head:
        raise LoadError("the file is empty", where=str(path), fix="get the file again")
    if head.startswith(ZIP_MAGIC):
        with open_archive(path, limits=limits) as archive:
            return archive.kind
    with reading(path):
        return _by_head(head, path)


def _by_head(head: bytes, path: Path) -> str:
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise LoadError(f"the file is {what}", where=str(path))
    if head.startswith(b"GGUF"):
        return "gguf"
    if head[8:9] == b"{":
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "legacy"
    if tarfile.is_tarfile(path):
        raise LoadError(
            "the file is a tar archive; torch wrote those before version 0.4",
            where=str(path),
            fix="load it with an old torch where you trust it, and save the state dict again",
        )
    if path.suffix.lower() == ".onnx" or head[0] == 0x08:  # protobuf field 1, ir_version
        return "onnx"
    raise LoadError(
        "the file is of no kind that graphopt reads",
        where=str(path),
        fix="give a .pt, .pth, .bin, .safetensors, .pt2, .onnx or .gguf file, or a Hugging Face "
        "folder",
    )
