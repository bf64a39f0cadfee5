"""What a scan finds, how a finding becomes an error, and the sizes a file may have."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Self

from graphopt.errors import GraphoptError, LoadError

DAMAGED_FIX = "get the file again, it may be cut short; or have it written again"

MAX_RATIO = 100.0
MAX_TOTAL_BYTES = 256 << 30
MAX_TEXT_BYTES = 256 << 20
MAX_MEMBERS = 500_000


@dataclass(frozen=True)
class Limits:
    """Sizes above which a file is refused.

    Attributes:
        ratio: unpacked over packed bytes, of one archive member and of the whole.
        total_bytes: unpacked bytes of a whole archive, or bytes of a file.
        text_bytes: bytes of one part that is parsed in memory (JSON, a pickle program, a header).
        members: number of files in an archive.
    """

    ratio: float = MAX_RATIO
    total_bytes: int = MAX_TOTAL_BYTES
    text_bytes: int = MAX_TEXT_BYTES
    members: int = MAX_MEMBERS

    @classmethod
    def from_env(cls) -> Self:
        """The defaults, each overridden by ``GRAPHOPT_MAX_RATIO``, ``GRAPHOPT_MAX_TOTAL_BYTES``, …

        Raises:
            GraphoptError: a variable is set to something that is not a positive number.
        """
        values: dict[str, Any] = {}
        for field in fields(cls):
            variable = env_name(field.name)
            if text := os.environ.get(variable):
                values[field.name] = _positive(variable, text, type(field.default))
        return cls(**values)


def env_name(limit: str) -> str:
    """The environment variable that overrides the field ``limit`` of :class:`Limits`."""
    return f"GRAPHOPT_MAX_{limit.upper()}"


def _positive(variable: str, text: str, kind: type) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if value > 0:
        return value
    raise GraphoptError(
        f"{text!r} is not a positive number", where=f"environment variable {variable}"
    )


@dataclass(frozen=True)
class Finding:
    """One reason not to load a file: what is wrong, where in the file, and what to do."""

    what: str
    where: str
    fix: str | None = None

    def error(self, others: int = 0) -> LoadError:
        """The finding as an error; ``others`` counts the findings that it stands for."""
        more = f" (and {others} more; `graphopt inspect` lists them)" if others else ""
        return LoadError(printable(self.what) + more, where=printable(self.where), fix=self.fix)


def printable(text: str) -> str:
    """``text`` with control characters spelled out: names in files may hold terminal escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def refuse(findings: Iterable[Finding]) -> None:
    """Raise the first finding as a :class:`LoadError`; do nothing where there is none."""
    found = list(findings)
    if found:
        raise found[0].error(len(found) - 1)


@contextmanager
def reading(where: object, fix: str | None = None) -> Iterator[None]:
    """Turn whatever goes wrong while hostile or damaged bytes are parsed into a ``LoadError``."""
    try:
        yield
    except GraphoptError:
        raise
    except FileNotFoundError as error:
        raise LoadError("there is no such file", where=str(where), fix="check the path") from error
    except Exception as error:  # parsers of hostile bytes raise anything, C++ errors included
        reason = printable(" ".join(str(error).split()))[:300] or type(error).__name__
        what = f"the file is damaged or not what it seems: {reason}"
        raise LoadError(what, where=str(where), fix=fix or DAMAGED_FIX) from error
