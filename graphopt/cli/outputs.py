"""Where a verb writes: the default name, and files that it must not write over."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from graphopt.errors import GraphoptError


def stem_of(model: str) -> str:
    """What a file made from MODEL is called, without its ending."""
    path = Path(model)
    return path.stem or path.resolve().name


def check_place(path: Path, endings: Sequence[str]) -> None:
    """Refuse a file whose ending says nothing, or whose folder is missing.

    Raises:
        GraphoptError: says what can be written.
    """
    if path.suffix not in endings:
        ending = f"that ends in {path.suffix}" if path.suffix else "without an ending"
        raise GraphoptError(
            f"cannot write a file {ending} from this model",
            where=str(path),
            fix=f"use one of {', '.join(endings)}",
        )
    if not path.parent.is_dir():
        raise GraphoptError(
            "the folder does not exist", where=str(path.parent), fix=f"mkdir -p {path.parent}"
        )


def check_outputs(outputs: Sequence[Path], read: Sequence[str | None]) -> None:
    """Refuse to write one file twice, or over a file that is read.

    Raises:
        GraphoptError: names the file.
    """
    sources = {os.path.realpath(name) for name in read if name}
    seen: set[str] = set()
    for path in outputs:
        real = os.path.realpath(path)
        if real in sources:
            raise GraphoptError(
                "the output would overwrite a file that it is made from",
                where=f"--output {path}",
                fix="write to another name",
            )
        if real in seen:
            raise GraphoptError(
                "the same output is named twice", where=f"--output {path}", fix="name it once"
            )
        seen.add(real)
