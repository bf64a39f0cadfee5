"""An ONNX file run by name in ONNX Runtime, held to the inputs that the file declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.inputs import DEFAULT_EXTENT, DTYPES, Inputs, TensorSpec, draw_inputs
from graphopt.onnx_types import RUNTIME

KNOWN = {
    kind: name for kind, name in RUNTIME.items() if name in DTYPES and not DTYPES[name].is_complex
}
"""Names of `DTYPES` by what ONNX Runtime calls them: types that can be drawn, and checked."""


def onnx_runner(
    path: Path,
) -> tuple[Callable[[Mapping[str, Any]], list[Any]], Callable[[], Inputs]]:
    """A function that runs the file on named tensors, and one that draws inputs for it.

    Both raise `GraphoptError`: for inputs that the file does not take, and for a signature that no
    tensors can be drawn for.
    """
    from graphopt.emit.onnx_runtime import open_session

    session = open_session(path)
    import onnxruntime

    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = 4  # what goes wrong is raised, and told once
    declared = session.get_inputs()

    def run(values: Mapping[str, Any]) -> list[Any]:
        for entry in declared:
            check_value(entry, values, path, [d.name for d in declared])
        feed = {d.name: values[d.name].detach().numpy() for d in declared}
        found = session.run(None, feed, quiet)
        return [torch.from_numpy(a) for a in found]

    return run, lambda: draw_inputs([spec_of(entry, path) for entry in declared])


def check_value(
    entry: Any,
    values: Mapping[str, Any],
    path: Path,
    wanted: list[str],
    *,
    where: str = "--inputs",
) -> None:
    """The input must be there, of the declared type, and of every size that has a number.

    Args:
        entry: what ONNX Runtime says of an input.
        wanted: names of all inputs.
        where: the option that they come from.
    """
    value = values.get(entry.name)
    if not isinstance(value, Tensor):
        raise GraphoptError(
            f"{path.name} needs the input {entry.name!r}",
            where=str(path),
            fix=f"name its inputs in {where}: {', '.join(wanted)}",
        )
    sizes = entry.shape
    fits = len(sizes) == value.dim() and all(
        not isinstance(size, int) or size == given
        for size, given in zip(sizes, value.shape, strict=True)
    )
    dtype = str(value.dtype).removeprefix("torch.")
    if not fits or KNOWN.get(entry.type, dtype) != dtype:
        shown = KNOWN.get(entry.type, entry.type)
        raise GraphoptError(
            f"{path.name} takes {entry.name!r} as {shown}{_sizes(sizes)}, "
            f"but {dtype}{list(value.shape)} was given",
            where=where,
            fix=f"write {entry.name}:{shown}{_sizes(sizes)}",
        )


def _sizes(sizes: list[Any]) -> str:
    """As a specification writes them; an axis whose name is a formula is called ``n``."""
    known = [s if isinstance(s, int) or (s and s.isidentifier()) else "n" for s in sizes]
    return f"[{','.join(map(str, known))}]"


def spec_of(entry: Any, path: Path) -> TensorSpec:
    """What to draw for an input, by what ONNX Runtime says of it.

    Raises:
        GraphoptError: no values can be drawn for its type.
    """
    if entry.type not in KNOWN:
        raise GraphoptError(
            f"cannot draw values for the input {entry.name!r} of type {entry.type}",
            where=str(path),
            fix="give them: --inputs FILE, with one named tensor per input",
        )
    shape = tuple(s if isinstance(s, int) else DEFAULT_EXTENT for s in entry.shape)
    axes = {i: str(s) for i, s in enumerate(entry.shape) if not isinstance(s, int)}
    return TensorSpec(entry.name, DTYPES[KNOWN[entry.type]], shape, axes)
