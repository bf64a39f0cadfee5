"""Checkpoints load through the weights-only reader or not at all."""

from __future__ import annotations

import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile_files import (
    Payload,
    Storage,
    checkpoint,
    legacy_checkpoint,
    pickled,
    saved,
    tensor,
    write_zip,
)

from graphopt.errors import LoadError
from graphopt.loading import inspect_file, load_model

TEN = struct.pack("<10f", *range(10))
ARCH = "torch.nn:Identity"


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def zipped(path: Path, marker: Path) -> Path:
    return write(path, saved({"w": torch.ones(1), "extra": Payload(marker)}))


def legacy(path: Path, marker: Path) -> Path:
    return write(path, saved({"e": Payload(marker)}, _use_new_zipfile_serialization=False))


def bare(path: Path, marker: Path) -> Path:
    return write(path, pickle.dumps(Payload(marker), 2))


def magic(path: Path, marker: Path) -> Path:
    """The payload stands where a legacy file has its magic number."""
    return write(path, pickle.dumps(Payload(marker), 2) + saved({"w": torch.ones(1)}))


def late(path: Path, marker: Path) -> Path:
    """The payload stands in the list of storages, the last pickle of a legacy file."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = (0x1950A86A20F9469CFC6C, 1001, system, {"w": 1}, [Payload(marker)])
    return write(path, b"".join(pickle.dumps(part, 2) for part in parts))


def newer_protocol(path: Path, marker: Path) -> Path:
    return checkpoint(path, {"e": Payload(marker)}, {}, protocol=4)


def in_an_old_tar(path: Path, marker: Path) -> Path:
    for name in ("storages", "tensors", "pickle"):
        write(path.with_name(name), pickle.dumps(Payload(marker), 2))
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(path.with_name(name), name)
    return path


PICKLES = {
    zipped: "would import and may run: .*pathlib",
    legacy: "would import and may run: .*pathlib",
    bare: "bare pickle",
    magic: "bare pickle",
    late: "damaged|storage",
    newer_protocol: "would import and may run: .*pathlib",
    in_an_old_tar: "tar archive",
}
Build = Callable[[Path, Path], Path]


def named(value: Build | str) -> str:
    return "" if isinstance(value, str) else value.__name__


@pytest.mark.parametrize(("build", "reason"), PICKLES.items(), ids=named)
@pytest.mark.parametrize("name", ["m.pt", "m.pth", "pytorch_model.bin", "m.onnx", "m"])
def test_pickles_are_not_run(
    build: Build, reason: str, name: str, tmp_path: Path, marker: Path
) -> None:
    path = build(tmp_path / name, marker)
    with pytest.raises(LoadError, match=reason):
        load_model(path)
    with pytest.raises(LoadError, match=reason):
        load_model(path, arch=ARCH)
    if build is not in_an_old_tar:
        inspect_file(path)
    assert not marker.exists()


def test_environment_cannot_lift_it(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(LoadError):
        load_model(zipped(tmp_path / "m.pt", marker))
    assert not marker.exists()


@pytest.mark.parametrize("build", [zipped, legacy, newer_protocol], ids=named)
def test_refusal_names_the_globals_and_both_ways_on(
    build: Build, tmp_path: Path, marker: Path
) -> None:
    path = build(tmp_path / "m.pt", marker)
    with pytest.raises(LoadError) as refusal:
        load_model(path)
    assert "pathlib" in refusal.value.what
    assert "--arch" in (refusal.value.fix or "") and "--trust-pickle" in (refusal.value.fix or "")
    assert any("pathlib" in name for name in inspect_file(path).unsafe_globals)


def test_newer_protocol_is_named(tmp_path: Path) -> None:
    """Harmless, but beyond the weights-only reader: it needs trust all the same."""
    value = claims(10, (2, 5), (5, 1))
    path = checkpoint(tmp_path / "m.pt", value, {"0": TEN}, protocol=4)
    with pytest.raises(LoadError, match="pickle protocol 4") as refusal:
        load_model(path, arch=ARCH)
    assert "--trust-pickle" in (refusal.value.fix or "")
    with pytest.raises(LoadError, match="fit the architecture"):
        load_model(path, arch=ARCH, trust_pickle=True)


@pytest.mark.parametrize("build", [zipped, legacy], ids=named)
def test_trust_runs_it(build: Build, tmp_path: Path, marker: Path) -> None:
    """The option does what it says, which also shows that the payload is live."""
    with pytest.raises(LoadError):
        load_model(build(tmp_path / "m.pt", marker), trust_pickle=True)
    assert marker.exists()


@pytest.mark.parametrize("legacy_format", [False, True])
def test_pickled_module_needs_trust(tmp_path: Path, legacy_format: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    path = tmp_path / "m.pt"
    torch.save(model, path, _use_new_zipfile_serialization=not legacy_format)
    with pytest.raises(LoadError, match=r"torch\.nn\.modules\.container\.Sequential"):
        load_model(path)
    loaded = load_model(path, trust_pickle=True)
    assert loaded.kind == "pickled_module" and loaded.module is not None
    assert not loaded.module.training
    torch.testing.assert_close(loaded.module(torch.ones(2)), model.eval()(torch.ones(2)))


def test_failing_safe_reader_is_an_error_not_a_fallback(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    load = torch.load

    def spy(*args: object, weights_only: bool, **kwargs: object) -> object:
        calls.append(weights_only)
        if weights_only:
            raise RuntimeError("the reader gave up")
        return load(*args, weights_only=False, **kwargs)

    monkeypatch.setattr(torch, "load", spy)
    with pytest.raises(LoadError, match="the reader gave up"):
        load_model(write(tmp_path / "m.pt", saved({"w": torch.ones(1)})), arch=ARCH)
    assert calls == [True]


def claims(claimed: int, size: tuple[int, ...], stride: tuple[int, ...] = (1,), offset: int = 0):
    return {"w": tensor(Storage("0", claimed), size, stride, offset)}


SHAPES = {
    "storage": (claims(1000, (1000,)), "claims 4000 bytes, the file holds 40"),
    "shape": (claims(10, (11,)), "needs 44 bytes of a storage that holds 40"),
    "stride": (claims(10, (2, 3), (8, 1)), "needs 44 bytes of a storage that holds 40"),
    "offset": (claims(10, (10,), offset=1), "needs 44 bytes"),
    "overflow": (claims(10, (1 << 62, 4), (4, 1)), "of a storage that holds 40"),
    "negative size": (claims(10, (-3,)), "make no tensor"),
    "negative stride": (claims(10, (3,), (-1,)), "make no tensor"),
    "negative offset": (claims(10, (3,), offset=-5), "make no tensor"),
    "negative storage": (claims(-1, (0,)), "claims -1 elements"),
    "rank": (claims(10, (3, 3), (1,)), "make no tensor"),
    "missing": ({"w": tensor(Storage("7", 10), (10,))}, "does not hold"),
}


@pytest.mark.parametrize(("value", "reason"), SHAPES.values(), ids=list(SHAPES))
def test_shapes_that_outrun_their_storage(value: dict, reason: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "m.pt", value, {"0": TEN})
    with pytest.raises(LoadError, match=reason):
        load_model(path, arch=ARCH)
    assert inspect_file(path).findings


@pytest.mark.parametrize(("value", "reason"), SHAPES.values(), ids=list(SHAPES))
def test_legacy_shapes_that_outrun_their_storage(value: dict, reason: str, tmp_path: Path) -> None:
    path = legacy_checkpoint(tmp_path / "m.pt", value, {"0": (10, TEN)})
    with pytest.raises(LoadError, match=reason):
        load_model(path, arch=ARCH)


def test_legacy_storage_shorter_than_it_says(tmp_path: Path) -> None:
    value = claims(1 << 40, (1 << 40,))
    path = legacy_checkpoint(tmp_path / "m.pt", value, {"0": (1 << 40, TEN)})
    with pytest.raises(LoadError, match="the file holds 40"):
        load_model(path, arch=ARCH)


def test_legacy_storage_that_would_stay_uninitialised(tmp_path: Path) -> None:
    """torch hands out whatever memory it gets for a storage that the file never fills."""
    path = legacy_checkpoint(tmp_path / "m.pt", claims(10, (10,)), {})
    with pytest.raises(LoadError, match="does not hold"):
        load_model(path, arch=ARCH)


@pytest.mark.parametrize("legacy_format", [False, True])
def test_honest_views_pass(tmp_path: Path, legacy_format: bool) -> None:
    whole = torch.arange(12.0)
    state = {
        "row": whole.view(3, 4)[1],
        "transposed": whole.view(3, 4).t(),
        "expanded": whole[:1].expand(5),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "complex": torch.ones(2, dtype=torch.complex64),
        "quantized": torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8),
        "parameter": torch.nn.Parameter(whole.clone()),
    }
    path = tmp_path / "m.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy_format)
    facts = inspect_file(path)
    assert not facts.findings and not facts.unsafe_globals
    shapes = {t.name: (t.dtype, t.shape) for t in facts.tensors}
    assert shapes["transposed"] == ("float32", (4, 3))
    assert shapes["half"] == ("bfloat16", (2,)) and shapes["quantized"] == ("qint8", (12,))
    with pytest.raises(LoadError, match="fit the architecture"):
        load_model(path, arch=ARCH)


def test_foreign_reference_is_refused(tmp_path: Path) -> None:
    class Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
        def persistent_id(self, item: object) -> object:
            return ("file", "/etc/passwd") if item == "x" else None

    path = tmp_path / "m.pt"
    import io

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": "x"})
    write_zip(path, {"m/data.pkl": buffer.getvalue(), "m/version": b"3\n"})
    with pytest.raises(LoadError, match="unknown reference"):
        load_model(path, arch=ARCH)


def test_huge_claims_inside_a_pickle_do_not_allocate(tmp_path: Path) -> None:
    huge = struct.pack("<Q", 1 << 50)
    for opcode in (b"\x96", b"\x8e", b"\x8d"):  # BYTEARRAY8, BINBYTES8, BINUNICODE8
        data = b"\x80\x05" + opcode + huge + b"x."
        path = write_zip(tmp_path / "m.pt", {"m/data.pkl": data, "m/version": b"3\n"})
        with pytest.raises(LoadError):
            load_model(path)
        path.write_bytes(data)
        with pytest.raises(LoadError):
            load_model(path)


def test_user_may_allow_a_class(tmp_path: Path) -> None:
    """torch's own allow list is respected: it is the user's explicit word."""
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(1), "path": pickle.PickleBuffer}, path)
    with pytest.raises(LoadError, match="PickleBuffer"):
        load_model(path, arch=ARCH)
    with (
        torch.serialization.safe_globals([pickle.PickleBuffer]),
        pytest.raises(LoadError, match="no state dict"),
    ):
        load_model(path, arch=ARCH)


def test_pickle_helper_makes_what_torch_makes(tmp_path: Path) -> None:
    """The handmade files are well formed: an honest one loads."""
    value = claims(10, (2, 5), (5, 1))
    path = checkpoint(tmp_path / "m.pt", value, {"0": TEN})
    assert torch.equal(torch.load(path)["w"], torch.arange(10.0).view(2, 5))
    path = legacy_checkpoint(tmp_path / "old.pt", value, {"0": (10, TEN)})
    assert torch.equal(torch.load(path)["w"], torch.arange(10.0).view(2, 5))
    assert pickled({"a": 1}) == pickle.dumps({"a": 1}, 2)
