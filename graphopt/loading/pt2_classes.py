"""Classes of transformers that a saved program takes or returns: outputs of models, and caches.

Structures of arguments and results name them. torch knows an output once its module is imported,
and a cache once `transformers.exporters` has registered it. That restores caches from a description
which names further classes; it imports those by dotted path, and calls sequences and mappings. Only
caches, what they consist of, and plain containers may be named there.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Iterator
from typing import Any

from torch.utils import _pytree as pytree

from graphopt.errors import LoadError, MissingDependencyError

_OWN = r"transformers\.(modeling_outputs|cache_utils|models\.\w+\.\w+)"
_OUTPUT = re.compile(rf"{_OWN}\.\w+")
_PART = re.compile(rf"{_OWN}:\w+")
_CONTAINERS = {
    *(f"builtins:{name}" for name in ("tuple", "list", "set", "frozenset", "dict")),
    *(f"collections:{name}" for name in ("OrderedDict", "deque")),
}


def part_reason(described: dict[str, Any]) -> str | None:
    """Why an entry of a cache's description may not be restored; ``None`` where it may.

    Args:
        described: ``_t`` is its kind and ``p``, where there is one, the class as ``module:name``.
    """
    path = described.get("p")
    if path is None or path in _CONTAINERS:
        return None
    makes = described.get("_t") in ("obj", "type")
    if makes and isinstance(path, str) and _PART.fullmatch(path):
        return None
    return f"a cache's description imports {path!r:.80}"


def register_classes(program: dict[str, Any], where: str) -> None:
    """Make the classes in a program's structures known to torch.

    Raises:
        LoadError: the installed transformers has no such class.
        MissingDependencyError: transformers is not installed.
    """
    for name in sorted(set(_types(program))):
        if name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE or not name.startswith("transformers."):
            continue
        if importlib.util.find_spec("transformers") is None:
            raise MissingDependencyError(
                f"the program takes or returns a {name}", fix="pip install 'graphopt[hf]'"
            )
        try:
            _register(name)
        except (ImportError, AttributeError) as error:
            raise LoadError(
                f"the program takes or returns a {name}, which the installed transformers lacks",
                where=where,
                fix="install the version of transformers that the file was made with",
            ) from error


def _register(name: str) -> None:
    if _OUTPUT.fullmatch(name):
        module, _, attribute = name.rpartition(".")
        getattr(importlib.import_module(module), attribute)
    elif _PART.fullmatch(name):
        module, _, attribute = name.partition(":")
        kind = getattr(importlib.import_module(module), attribute)
        exporter = importlib.import_module("transformers.exporters.exporter_dynamo")
        if exporter.is_cache_class(kind):
            exporter.register_pytree_node(kind)


def _types(program: dict[str, Any]) -> Iterator[str]:
    """The types of all nodes in the structures of arguments and results."""
    for entry in program["graph_module"].get("module_call_graph") or ():
        signature = entry.get("signature") or {}
        for text in (signature.get("in_spec"), signature.get("out_spec")):
            stack: list[Any] = json.loads(text)[1:] if text else []
            while stack:
                spec = stack.pop()
                if isinstance(spec.get("type"), str):
                    yield spec["type"]
                stack.extend(spec.get("children_spec") or ())
