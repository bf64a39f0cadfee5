"""Damaged files of every kind give one clear error, never another exception and never a crash."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from graphopt.errors import GraphoptError, LoadError
from graphopt.loading import inspect_file, load_model, scan_archive

NAMES = ["m.pt", "m.pth", "m.bin", "m.pt2", "m.onnx", "m.safetensors", "m.gguf", "m.zip", "m"]


def attempt(path: Path) -> None:
    """Every way in either works or raises the family's error with a place."""
    for read in (load_model, inspect_file, scan_archive, with_arch):
        try:
            read(path)
        except LoadError as error:
            assert error.where
            assert "Traceback" not in str(error)
        except GraphoptError as error:
            assert "pip install" in (error.fix or "")


def with_arch(path: Path) -> None:
    load_model(path, arch="torch.nn:Identity")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, clean_pt2: Path) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("samples")
    state = {"layer.weight": torch.randn(3, 3), "layer.bias": torch.randn(3)}
    torch.save(state, folder / "zip.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "script.pt")
    from safetensors.torch import save_file

    save_file(state, folder / "m.safetensors")
    samples = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    samples["m.pt2"] = clean_pt2.read_bytes()
    samples["m.gguf"] = small_gguf()
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(n, 1, [2]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    samples["m.onnx"] = onnx.helper.make_model(graph).SerializeToString()
    return samples


def small_gguf() -> bytes:
    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little")

    def text(value: str) -> bytes:
        return number(len(value), 8) + value.encode()

    entry = text("general.architecture") + number(8, 4) + text("llama")
    array = text("tokenizer.scores") + number(9, 4) + number(6, 4) + number(3, 8) + bytes(12)
    tensor = text("w") + number(2, 4) + number(4, 8) + number(2, 8) + number(0, 4) + number(0, 8)
    head = b"GGUF" + number(3, 4) + number(1, 8) + number(2, 8) + entry + array + tensor
    return head + bytes(-len(head) % 32) + bytes(32)


KINDS = ["zip.pt", "legacy.pt", "script.pt", "m.safetensors", "m.pt2", "m.gguf", "m.onnx"]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_sound(kind: str, samples: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / kind
    path.write_bytes(samples[kind])
    assert not inspect_file(path).findings


@pytest.mark.parametrize("kind", KINDS)
def test_truncated(kind: str, samples: dict[str, bytes], tmp_path: Path) -> None:
    data = samples[kind]
    for count in sorted({0, 1, 2, 4, 8, 9, 64, len(data) // 3, len(data) // 2, len(data) - 1}):
        path = tmp_path / kind
        path.write_bytes(data[:count])
        attempt(path)
        if kind != "m.onnx":  # a protobuf may end after any of its fields
            with pytest.raises(LoadError):
                load_model(path, arch="torch.nn:Identity")


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bytes(kind: str, samples: dict[str, bytes], tmp_path: Path) -> None:
    chance = random.Random(7)
    path = tmp_path / kind
    for _ in range(25):
        data = bytearray(samples[kind])
        for _ in range(chance.choice([1, 3, 20])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        attempt(path)


@pytest.mark.parametrize(
    "head", [b"", b"PK\x03\x04", b"\x80\x02", b"GGUF", b"\x08\x07", b"\x00" * 8 + b"{"]
)
def test_random_bytes(head: bytes, tmp_path: Path) -> None:
    chance = random.Random(11)
    for name in NAMES:
        path = tmp_path / name
        path.write_bytes(head + chance.randbytes(chance.choice([3, 60, 900])))
        attempt(path)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_name(name: str, samples: dict[str, bytes], tmp_path: Path) -> None:
    for data in samples.values():
        (tmp_path / name).write_bytes(data)
        attempt(tmp_path / name)


@pytest.mark.parametrize("name", NAMES)
def test_missing_empty_and_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(LoadError, match="no such file"):
        load_model(path)
    path.touch()
    with pytest.raises(LoadError, match="the file is empty"):
        load_model(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(LoadError, match=r"no weights|no config\.json"):
        load_model(path)


def test_things_that_are_no_files(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.pt"
    os.mkfifo(pipe)
    loop = tmp_path / "loop.pt"
    loop.symlink_to(loop)
    for path in (pipe, loop, tmp_path / "a\x00b", tmp_path / ("x" * 5000)):
        with pytest.raises(LoadError):
            load_model(path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(LoadError):
        load_model(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x7fELF\x02\x01\x01", "native program"),
        (b"version https://git-lfs.github.com/spec/v1\noid", r"git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"just some text, no model", "of no kind that graphopt reads"),
    ],
)
def test_files_of_other_kinds_are_named(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(data)
    with pytest.raises(LoadError, match=reason):
        load_model(path)
