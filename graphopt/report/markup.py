"""HTML built from elements: every text and attribute is escaped unless it is markup already."""

from __future__ import annotations

import html
import json
from typing import Any

VOID = frozenset({"br", "input", "meta", "wbr"})


class Markup(str):
    """Text that is HTML; only `tag`, `join` and the page's own files make it."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | bool | None) -> Markup:
    """An element. ``class_`` spells ``class``, ``data_x`` ``data-x``; ``None`` is left out."""
    given = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Children in a row, escaped where they are plain text."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(c) for c in children))


BREAK = tag("wbr")
"""Where a long line may be broken."""


def prose(text: str) -> Markup:
    """Text in which names stand in backticks."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return join(text)
    return join(*(tag("code", p) if i % 2 else p for i, p in enumerate(parts)))


def _attribute(key: str, value: str | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(value)}"'


def script_data(identifier: str, data: Any) -> Markup:
    """Plain data for the page's script, in a block that no value in it can close."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    safe = text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")
    return tag("script", Markup(safe), type="application/json", id=identifier)
