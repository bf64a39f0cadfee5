"""A model whose saved module tests compare with the one in memory, and edits of its file."""

from __future__ import annotations

import enum
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from graphopt.artifact import SIDE_FILE
from graphopt.emit.module import OptimizedModule

RECORD = f"extra/{SIDE_FILE}"
AXES = {0: "batch", 1: "seq"}


class Mode(enum.Enum):
    MEAN = 1
    LAST = 2


class Pool(nn.Module):
    """Defaults of every kind, an optional tensor, a keyword-only flag."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        scale: float = 2.0,
        sizes: tuple[int, ...] = (1, 2),
        *,
        dtype: torch.dtype = torch.float32,
        mode: Mode = Mode.MEAN,
        low: float = -math.inf,
    ) -> dict[str, Tensor]:
        hidden = self.layer(x) * scale
        hidden = hidden if mask is None else hidden * mask[..., None]
        return {"pooled": hidden.mean(1).clamp_min(low).to(dtype), "hidden": hidden}


X, MASK = torch.randn(3, 5, 8), torch.ones(3, 5)
Y, LESS = torch.randn(2, 7, 8), torch.rand(2, 7)


def compiled(*args: Any, **kwargs: Any) -> OptimizedModule:
    named = {**dict(zip(("x", "mask"), args, strict=False)), **kwargs}
    shapes = {name: AXES for name in ("x", "mask") if name in named}
    torch.manual_seed(3)
    return graphopt.compile(
        Pool().eval(),
        example_inputs=args,
        example_kwargs=kwargs,
        dynamic_shapes=shapes,
        measure=False,
    )


def through_a_file(module: OptimizedModule, folder: Path) -> OptimizedModule:
    return graphopt.load(graphopt.save(module, folder / "module.pt2"))


def edited(source: Path, target: Path, edit: Callable[[str], str]) -> Path:
    """The archive with another ``graphopt.json``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            if member.filename.endswith(RECORD):
                data = edit(data.decode()).encode()
            new.writestr(member, data)
    return target


def change(*path: Any, to: Any) -> Callable[[str], str]:
    def edit(text: str) -> str:
        data = json.loads(text)
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        if to is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to
        return json.dumps(data)

    return edit
