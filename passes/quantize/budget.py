"""Budgets of a search for bits: what users write, in bytes and nanoseconds."""

from __future__ import annotations

import math
import re
from typing import Any, Protocol

from graphopt.passes.quantize.sensitivity import KINDS

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:(%)|([kmg]i?)?b)\s*", re.IGNORECASE)


class Given(Protocol):
    """Options of `QuantizeMatmul`."""

    @property
    def bits(self) -> Any: ...
    @property
    def size(self) -> Any: ...
    @property
    def latency(self) -> Any: ...
    @property
    def sensitivity(self) -> str: ...


def check_budget(given: Given) -> None:
    """Whether options of a search are what they can be, and go together.

    Raises:
        ValueError: they do not; the message says what does.
    """
    if given.size is not None:
        bytes_of(given.size, 1)
    latency = given.latency
    if latency is not None and not (0 < latency < math.inf):
        raise ValueError(f"latency is a positive number of milliseconds, not {latency!r}")
    if given.sensitivity not in KINDS:
        raise ValueError(f"sensitivity {given.sensitivity!r} is not one of {', '.join(KINDS)}")
    if not isinstance(given.bits, int):
        _check_bits(given.bits)
        if given.size is not None and latency is not None:
            raise ValueError("a search for bits has one budget: size or latency")
        return
    asked = {"size": given.size, "latency": latency}
    asked["sensitivity"] = None if given.sensitivity == KINDS[0] else given.sensitivity
    for name, value in asked.items():
        if value is not None:
            raise ValueError(
                f"{name} is for a search: give several bits to choose from, bits=(2, 3, 4, 8)"
            )


def _check_bits(bits: Any) -> None:
    if (
        not isinstance(bits, tuple)
        or not bits
        or not all(isinstance(b, int) and not isinstance(b, bool) for b in bits)
    ):
        raise ValueError(f"bits is a number, or several to choose from, not {bits!r:.80}")
    if len(set(bits)) < len(bits):
        raise ValueError(f"bits={bits!r:.80} has a number twice")


def bytes_of(size: int | str, whole: int) -> int:
    """A size in bytes.

    Args:
        whole: what ``"100%"`` is.

    Raises:
        ValueError: it is no size.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None or float(found[1]) == 0:
        raise ValueError(f"size is bytes, or such as '85MB' or '40%', not {size!r:.80}")
    number, percent, unit = found.groups()
    factor = whole / 100 if percent else _UNITS[(unit or "").lower()]
    return int(float(number) * factor)
