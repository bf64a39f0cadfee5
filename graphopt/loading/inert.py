"""Pickles read without importing, calling or building anything they name.

Every global becomes a class made on the spot that only records its arguments, so the structure of
any pickle, hostile ones included, can be looked at: which globals it wants, which storages it
refers to, and which tensors (dtype, shape, strides) it would rebuild.
"""

from __future__ import annotations

import pickle
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

_PLAIN = {"collections.OrderedDict": OrderedDict, "collections.Counter": Counter}
_STORAGE_DTYPES = {
    "UntypedStorage": torch.uint8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "QUInt8Storage": torch.quint8,
    "QInt8Storage": torch.qint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}


class Inert:
    """Stands for an object that a pickle would have made: its global, arguments and state."""

    origin = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.state: Any = None
        self.items: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return Inert(self, *args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def parts(self) -> tuple[Any, ...]:
        """Everything it was made from, to walk on."""
        return self.args, self.kwargs, self.state, self.items


@dataclass(frozen=True)
class Storage:
    """A reference to ``numel`` elements kept under ``key``; ``dtype`` is None where unknown."""

    key: str
    dtype: torch.dtype | None
    numel: Any

    @property
    def nbytes(self) -> int | None:
        if self.dtype is None or type(self.numel) is not int or self.numel < 0:
            return None
        return int(self.numel) * self.dtype.itemsize


@dataclass
class PickleFacts:
    """What one pickle holds: the globals it names, its references, and its inert value."""

    globals: set[str] = field(default_factory=set)
    storages: list[Storage] = field(default_factory=list)
    foreign: list[Any] = field(default_factory=list)
    protocol: int = 0
    value: Any = None


class Stream(Protocol):
    """What a pickle is read from."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...


def read_pickle(stream: Stream) -> PickleFacts:
    """Read one pickle from ``stream``, leaving it positioned after the pickle.

    Raises:
        Exception: of any type, where the bytes are no pickle.
    """
    reader = _Reader(stream)
    reader.facts.value = reader.load()
    reader.facts.protocol = reader.proto
    return reader.facts


# The Python unpickler: its memo is a dict, so a pickle cannot claim a huge one.
_Unpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Reader(_Unpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_Unpickler.dispatch)

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream, encoding="utf-8", errors="replace")
        self.facts = PickleFacts()

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:  # written with the names of Python 2
            module, name = NAME_MAPPING.get((module, name), (module, name))
            module = IMPORT_MAPPING.get(module, module)
        origin = f"{module}.{name}"
        self.facts.globals.add(origin)
        return _PLAIN.get(origin) or type("Inert", (Inert,), {"origin": origin})

    def get_extension(self, code: int) -> None:
        self.append(self.find_class("copyreg", f"extension {code}"))

    def persistent_load(self, reference: Any) -> Any:
        match reference:
            case ("storage" | b"storage", kind, key, _, numel, *_):
                storage = Storage(str(key), _storage_dtype(kind), numel)
                self.facts.storages.append(storage)
                return storage
            case ("module" | b"module", kind, *_):  # a class with its source, in legacy files
                return kind
        self.facts.foreign.append(reference)
        return Inert(reference)

    def load_bytearray8(self) -> None:
        """As the base class, but reads before it allocates what the pickle claims."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        self.append(kind(*arguments))

    def load_newobj_ex(self) -> None:
        keywords, arguments, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.append(kind(*arguments, **keywords))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex


def _storage_dtype(kind: Any) -> torch.dtype | None:
    origin = getattr(kind, "origin", "")
    return _STORAGE_DTYPES.get(origin.rpartition(".")[2])


@dataclass(frozen=True)
class TensorRef:
    """A tensor that a pickle would rebuild; sizes in elements, unchecked."""

    name: str
    storage: Storage
    dtype: torch.dtype | None
    offset: Any
    size: Any
    stride: Any

    @property
    def sizes(self) -> tuple[Any, ...]:
        """The shape, with texts where the pickle holds something else than numbers."""
        return tuple(n if type(n) is int else repr(n)[:20] for n in _numbers(self.size))

    @property
    def elements_needed(self) -> int | None:
        """Elements the storage must hold, or None where the numbers make no sense."""
        numbers = [self.offset, *_numbers(self.size), *_numbers(self.stride)]
        if any(type(n) is not int or n < 0 for n in numbers):
            return None
        if len(_numbers(self.size)) != len(_numbers(self.stride)):
            return None
        if 0 in self.size:
            return 0
        steps = zip(self.size, self.stride, strict=True)
        return int(self.offset) + sum(int((n - 1) * step) for n, step in steps) + 1


def _numbers(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (None,)


def tensor_refs(value: Any) -> Iterator[TensorRef]:
    """Every strided tensor in an inert value, named by its path (``model.layer.weight``)."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        name, item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Inert) and (ref := _tensor_ref(name, item)):
            yield ref
        else:
            stack.extend(reversed(list(_children(name, item))))


def _children(name: str, item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, dict):
        for key, child in item.items():
            label = str(key) if isinstance(key, str | int) else "?"
            yield (f"{name}.{label}" if name else label), child
    elif isinstance(item, list | tuple):
        yield from ((name, child) for child in item)
    elif isinstance(item, Inert):
        yield from ((name, child) for child in item.parts())


def _tensor_ref(name: str, item: Inert) -> TensorRef | None:
    if not item.origin.startswith("torch._utils._rebuild_") or len(item.args) < 4:
        return None
    storage, offset, size, stride = item.args[:4]
    if isinstance(size, Inert) and size.origin == "torch.Size" and size.args:
        size = size.args[0]
    if not isinstance(storage, Storage):
        return None
    return TensorRef(name or "(unnamed)", storage, _dtype(item, storage), offset, size, stride)


def _dtype(item: Inert, storage: Storage) -> torch.dtype | None:
    if item.origin.endswith("_rebuild_tensor_v3") and len(item.args) > 6:
        found = getattr(torch, getattr(item.args[6], "origin", "").removeprefix("torch."), None)
        return found if isinstance(found, torch.dtype) else None
    return storage.dtype
