"""YAML read as plain data, and mappings whose keys must be known."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from graphopt.errors import RecipeError
from graphopt.loading.findings import MAX_TEXT_BYTES

_MAX_ALIASES = 1000


def safe_yaml(source: str | os.PathLike[str]) -> Any:
    """Parse YAML into plain data: mappings, lists, texts, numbers, dates.

    Args:
        source: a path object, or a text. A text in one line that ends in ``.yaml`` or ``.yml`` is
            a path too.

    Raises:
        RecipeError: the file is missing or no UTF-8, the YAML is wrong (with its line), uses tags
            that would build objects, says a key twice, or expands aliases without end.
    """
    where = "the given text"
    try:
        if _is_path(source):
            where = os.fspath(source)
            text = _text(Path(source))
        else:
            text = os.fspath(source)
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{where}:{mark.line + 1}" if mark else where
        raise RecipeError(f"the YAML is wrong: {error.problem}", where=line) from error
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"the YAML cannot be read: {error}", where=where) from error


def _is_path(source: str | os.PathLike[str]) -> bool:
    if not isinstance(source, str):
        return True
    return "\n" not in source and source.strip().lower().endswith((".yaml", ".yml"))


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"the file is larger than {MAX_TEXT_BYTES} bytes")
    return path.read_text(encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """SafeLoader that also refuses repeated keys and floods of aliases."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > _MAX_ALIASES:
                raise yaml.YAMLError(f"more than {_MAX_ALIASES} aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in getattr(node, "value", ()):
            if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key_node.value, str):
                if key_node.value in seen:
                    problem = f"the key {key_node.value!r} is there twice"
                    raise yaml.constructor.ConstructorError(
                        None, None, problem, key_node.start_mark
                    )
                seen.add(key_node.value)
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


def check_keys(mapping: Any, valid: Iterable[str], where: str) -> None:
    """Refuse keys that are not in ``valid``, naming the nearest valid one.

    Raises:
        RecipeError: a key is unknown, or ``mapping`` is no mapping.
    """
    names = list(valid)
    if not isinstance(mapping, Mapping):
        raise RecipeError(f"a mapping was expected, not {mapping!r:.60}", where=where)
    for key in mapping:
        if key in names:
            continue
        near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]!r}?" if near else f"valid names: {', '.join(names)}"
        raise RecipeError(f"unknown name {key!r}", where=where, fix=fix)
