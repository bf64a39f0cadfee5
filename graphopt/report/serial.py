"""Reports to plain data and back: strict JSON out, checked types in.

JSON has no NaN and no infinity. They are written as ``null``, and a note says where.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import cache
from typing import Any, TypeVar

from graphopt.errors import LoadError

T = TypeVar("T")


def plain(value: Any) -> Any:
    """``value`` as dicts with string keys, lists, strings, numbers, booleans and ``None``.

    What JSON cannot spell (a dtype, a path, a callable) becomes its text.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(item) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else str(value)


def finite(data: dict[str, Any]) -> dict[str, Any]:
    """Plain data with ``null`` for NaN and infinities, and a note in ``notes`` for each."""
    found: list[tuple[str, float]] = []
    cleaned: dict[str, Any] = _without_infinities(data, "", found)
    known = cleaned["notes"]
    cleaned["notes"] = known + [
        f"{where} is {value} (null in JSON)"
        for where, value in found
        if not any(note.startswith(f"{where} is ") for note in known)
    ]
    return cleaned


def _without_infinities(value: Any, where: str, found: list[tuple[str, float]]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        found.append((where, value))
        return None
    if isinstance(value, dict):
        step = f"{where}." if where else ""
        return {k: _without_infinities(v, f"{step}{k}", found) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_infinities(v, f"{where}[{i}]", found) for i, v in enumerate(value)]
    return value


def build(kind: type[T], data: Any, where: str = "report") -> T:
    """Make the dataclass ``kind`` from plain data; keys it does not know are left out.

    Raises:
        LoadError: a field is missing or has the wrong type; ``where`` names it.
    """
    if not isinstance(data, dict):
        raise _unexpected(data, "an object", where)
    return kind(**dict(_fields(kind, data, where)))


def _fields(kind: type, data: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    hints = _hints(kind)
    for item in dataclasses.fields(kind):
        if item.name in data:
            yield item.name, _read(hints[item.name], data[item.name], f"{where}.{item.name}")
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise LoadError(f"the field {item.name!r} is missing", where=where)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint`` asks for; ``null`` in a number's place is NaN."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _read(arguments[0], value, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin in (list, tuple):
        return origin(_items(arguments[0], value, where))
    if origin is dict:
        return {k: _read(arguments[1], v, f"{where}.{k}") for k, v in _object(value, where)}
    return _scalar(hint, value, where)


def _items(hint: Any, value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _unexpected(value, "a list", where)
    return [_read(hint, item, f"{where}[{i}]") for i, item in enumerate(value)]


def _object(value: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise _unexpected(value, "an object", where)
    return list(value.items())


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and value is None:
        return math.nan
    boolean = isinstance(value, bool)
    if hint is float and isinstance(value, int | float) and not boolean:
        return float(value)
    if not isinstance(value, hint) or (boolean and hint is not bool):
        raise _unexpected(value, hint.__name__, where)
    return value


def _unexpected(value: Any, wanted: str, where: str) -> LoadError:
    return LoadError(f"expected {wanted}, found {type(value).__name__}", where=where)
