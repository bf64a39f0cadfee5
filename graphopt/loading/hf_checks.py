"""Checks around transformers' own loader, and keeping it quiet."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import LoadError
from graphopt.loading.findings import printable, refuse
from graphopt.loading.hf_folder import count_findings

_PARAMETERS_PER_BYTE = 16  # more than any packing of weights reaches


def empty_model(kind_of_model: Any, config: Any, files: Iterable[Path], folder: Path) -> Any:
    """The model that a config describes, without memory.

    Raises:
        LoadError: it is a far larger model than the weights are of: it would fill the memory.
    """
    stored = sum(file.stat().st_size for file in files)
    refuse(count_findings(config.to_dict(), str(folder)))
    build = getattr(kind_of_model, "from_config", kind_of_model)
    with torch.device("meta"):
        model = build(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _PARAMETERS_PER_BYTE * stored + 1_000_000:
        raise LoadError(
            f"the config describes {count} parameters, the weights have {stored} bytes",
            where=str(folder),
            fix="get the complete weights, or the config that belongs to them",
        )
    return model


def refuse_mismatched(found: Iterable[Any], folder: Path) -> None:
    """Weights of another shape than the config says, which transformers has left out."""
    rows = sorted(tuple(row) for row in found)
    if not rows:
        return
    name, stored, wanted = rows[0]
    more = f" (and {len(rows) - 1} more tensors do not fit)" if len(rows) > 1 else ""
    raise LoadError(
        f"the weights do not fit the config: {printable(str(name))!s:.200} has shape "
        f"{list(stored)} in the file, and {list(wanted)} by config.json{more}",
        where=str(folder),
        fix="get the config.json that belongs to the weights",
    )


def key_notes(info: dict[str, Any]) -> list[str]:
    """Weights that the files lack, which transformers draws at random, and those it left unused."""
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    notes = [f"drawn at random, for the files lack them: {_some(missing)}"] if missing else []
    return notes + ([f"left unused: {_some(unused)}"] if unused else [])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return printable(", ".join(names[:6])) + more


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing over the caller's output, and from printing its own report on
    the weights, which the notes tell."""
    log = importlib.import_module("transformers.utils.logging")
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()
