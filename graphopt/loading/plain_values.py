"""Python values of a call as plain JSON and back: numbers, texts, containers, dtypes, devices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import LoadError

_TAG = "is"
_FIX = "save the module again; the file was changed or damaged after it was written"
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, eq=False)
class Opaque:
    """Stands for a value that no file holds: equal to nothing but itself, shown as it was."""

    shown: str

    def __repr__(self) -> str:
        return self.shown


def encoded(value: Any) -> Any:
    """``value`` as JSON; what JSON has no words for is an object that says what it is."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_TAG: "float", "value": str(value)}
    if type(value) is list:
        return [encoded(item) for item in value]
    if type(value) is tuple:
        return {_TAG: "tuple", "items": [encoded(item) for item in value]}
    if type(value) is dict:
        return {_TAG: "dict", "items": [[encoded(k), encoded(v)] for k, v in value.items()]}
    if isinstance(value, torch.dtype | torch.device):
        kind = "dtype" if isinstance(value, torch.dtype) else "device"
        return {_TAG: kind, "value": str(value).removeprefix("torch.")}
    return {_TAG: "other", "value": "a tensor" if isinstance(value, Tensor) else repr(value)}


def decoded(data: Any, where: str) -> Any:
    """The value behind what `encoded` wrote.

    Raises:
        LoadError: it wrote no such thing.
    """
    if isinstance(data, list):
        return [decoded(item, f"{where}[{i}]") for i, item in enumerate(data)]
    if not isinstance(data, dict):
        return data
    try:
        return _tagged(data, where)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise LoadError(f"no value of a call: {data!s:.200}", where=where, fix=_FIX) from error


def _tagged(data: dict[str, Any], where: str) -> Any:
    match data:
        case {"is": "float", "value": str(text)}:
            return _SPECIAL[text]
        case {"is": "tuple", "items": list(items)}:
            return tuple(decoded(item, f"{where}[{i}]") for i, item in enumerate(items))
        case {"is": "dict", "items": list(items)}:
            return {decoded(k, where): decoded(v, f"{where}[{k!r}]") for k, v in items}
        case {"is": "dtype", "value": str(text)} if isinstance(vars(torch).get(text), torch.dtype):
            return vars(torch)[text]
        case {"is": "device", "value": str(text)}:
            return torch.device(text)
        case {"is": "other", "value": str(text)}:
            return Opaque(text)
    raise ValueError(f"unknown object with {sorted(data)}")
