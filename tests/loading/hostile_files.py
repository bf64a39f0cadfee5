"""Builders of malicious files. What would run only creates a marker file."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

CONTENTS = dict[str, bytes]


class Payload:
    """Unpickling it creates ``marker``."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def payload_code(marker: Path) -> str:
    """An expression whose evaluation creates ``marker``."""
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


def saved(value: Any, **options: Any) -> bytes:
    """The bytes of ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def write_zip(path: Path, contents: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def read_zip(path: Path) -> CONTENTS:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(source: Path, target: Path, edit: Callable[[CONTENTS], None]) -> Path:
    """A copy of a torch archive whose members, named without the root, were edited."""
    contents = read_zip(source)
    root = next(iter(contents)).split("/")[0] + "/"
    bare = {name.removeprefix(root): data for name, data in contents.items()}
    edit(bare)
    return write_zip(target, {root + name: data for name, data in bare.items()})


def edit_json(contents: CONTENTS, record: str, edit: Callable[[Any], None]) -> None:
    value = json.loads(contents[record])
    edit(value)
    contents[record] = json.dumps(value).encode()


class Storage:
    """Pickles as a reference to ``claimed`` elements of storage ``key``."""

    def __init__(self, key: str, claimed: int, kind: type = torch.FloatStorage) -> None:
        self.key, self.claimed, self.kind = key, claimed, kind


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def tensor(
    storage: Storage, size: tuple[int, ...], stride: tuple[int, ...] = (1,), offset: int = 0
) -> Call:
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, storage, offset, size, stride, False, OrderedDict())


def pickled(value: Any, protocol: int = 2, legacy: bool = False) -> bytes:
    """``value`` pickled as torch pickles it, with references for storages."""

    class Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
        def persistent_id(self, item: Any) -> Any:
            if isinstance(item, Storage):
                reference = ("storage", item.kind, item.key, "cpu", item.claimed)
                return (*reference, None) if legacy else reference
            return None

    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(value)
    return buffer.getvalue()


def checkpoint(path: Path, value: Any, storages: Mapping[str, bytes], protocol: int = 2) -> Path:
    """A zipped checkpoint with a handmade pickle."""
    contents = {"m/data.pkl": pickled(value, protocol), "m/byteorder": b"little"}
    contents |= {f"m/data/{key}": data for key, data in storages.items()}
    return write_zip(path, contents | {"m/version": b"3\n"})


def legacy_checkpoint(path: Path, value: Any, storages: Mapping[str, tuple[int, bytes]]) -> Path:
    """A checkpoint of before torch 1.6; storages as (elements claimed, bytes)."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    data = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, system))
    data += pickled(value, legacy=True) + pickle.dumps(list(storages), 2)
    data += b"".join(struct.pack("<q", n) + held for n, held in storages.values())
    path.write_bytes(data)
    return path
