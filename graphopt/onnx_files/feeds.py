"""What an ONNX file is compared on: given inputs, and drawn ones at other sizes of its axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.inputs import SEED, TensorSpec, draw_inputs
from graphopt.onnx_files.values import Feed, as_arrays
from graphopt.onnx_side import KNOWN, check_value, spec_of

UNSEEN = 3
"""What axes with a name get besides the sizes of the first inputs: so many, the next one more."""
CALIBRATION_SETS = 4
"""Calibration inputs that outputs are compared on; more would only cost time."""


@dataclass(frozen=True)
class Feeds:
    """Inputs that a file is run on.

    Attributes:
        first: what is timed, and what passes look at.
        others: pairs of what they are, in words, and inputs: there the file may refuse to run.
        calibration: all that was given for calibration.
    """

    first: Feed
    others: tuple[tuple[str, Feed], ...] = ()
    calibration: tuple[Feed, ...] = ()


def feeds_for(
    session: Any,
    path: Path,
    given: Mapping[str, Any] | None,
    calibration: Sequence[Mapping[str, Any]] = (),
) -> Feeds:
    """Inputs for a session of the file.

    Raises:
        GraphoptError: what is given does not fit what the file declares, or no inputs are given and
            none can be drawn.
    """
    declared = session.get_inputs()
    if given is not None:
        _check(declared, given, path, "--inputs")
    for batch in calibration:
        _check(declared, batch, path, "--calibration")
    first = as_arrays(given) if given is not None else _drawn(declared, path)
    batches = tuple(as_arrays(batch) for batch in calibration)
    others: list[tuple[str, Feed]] = [
        ("calibration inputs", batch) for batch in batches[:CALIBRATION_SETS]
    ]
    others += _at_other_sizes(declared, path, first)
    others += _overridden(session, first)
    return Feeds(first, tuple(others), batches)


def _check(declared: Sequence[Any], given: Mapping[str, Any], path: Path, where: str) -> None:
    known = [entry.name for entry in declared]
    for entry in declared:
        if entry.type in KNOWN:
            check_value(entry, given, path, known, where=where)
        elif entry.name not in given:
            raise GraphoptError(
                f"{path.name} needs the input {entry.name!r}, of type {entry.type}",
                where=where,
                fix="give it to graphopt.optimize_onnx(inputs=...)",
            )
    if unknown := sorted(set(given) - set(known)):
        raise GraphoptError(
            f"{path.name} has no input {unknown[0]!r}",
            where=where,
            fix=f"its inputs are {', '.join(known) or 'none'}",
        )


def _drawn(declared: Sequence[Any], path: Path) -> Feed:
    return as_arrays(draw_inputs([spec_of(entry, path) for entry in declared]).kwargs)


def _at_other_sizes(declared: Sequence[Any], path: Path, first: Feed) -> Iterator[tuple[str, Feed]]:
    """Fresh values at the sizes of ``first``, at sizes that are in none of it, and at 1."""
    try:
        specs = [spec_of(entry, path) for entry in declared]
    except GraphoptError:
        return  # values are given, and others cannot be drawn
    axes = list(dict.fromkeys(_axes(specs)))
    own = {axis: _size(axis, specs, first) for axis in axes}
    sets = {"fresh values": own}
    if axes:
        taken = set(own.values())
        free = (n for n in range(UNSEEN, UNSEEN + 2 * len(axes) + len(taken)) if n not in taken)
        sets["sizes not seen before"] = dict(zip(axes, free, strict=False))
        sets["sizes of 1"] = dict.fromkeys(axes, 1)
    for index, (what, sizes) in enumerate(sets.items()):
        found = draw_inputs([_sized(spec, sizes) for spec in specs], seed=index + 1)
        yield what, as_arrays(found.kwargs)


def _axes(specs: Sequence[TensorSpec]) -> Iterator[tuple[str, int, str]]:
    for spec in specs:
        yield from (_key(spec, axis) for axis in spec.axes)


def _key(spec: TensorSpec, axis: int) -> tuple[str, int, str]:
    """Axes of one name are one; those without a name are each their own."""
    name = spec.axes[axis]
    return ("", 0, name) if name not in ("None", "") else (spec.name, axis, "")


def _size(key: tuple[str, int, str], specs: Sequence[TensorSpec], first: Feed) -> int:
    return next(
        int(first[spec.name].shape[axis])
        for spec in specs
        for axis in spec.axes
        if _key(spec, axis) == key
    )


def _sized(spec: TensorSpec, sizes: Mapping[tuple[str, int, str], int]) -> TensorSpec:
    shape = list(spec.shape)
    for axis in spec.axes:
        shape[axis] = sizes[_key(spec, axis)]
    return replace(spec, shape=tuple(shape))


def _overridden(session: Any, first: Feed) -> Iterator[tuple[str, Feed]]:
    """Initializers that callers may override, with other values of the sizes they have.

    Rewrites must not read them. Integers are left as they are: they are sizes and axes.
    """
    import numpy as np

    generator, others = np.random.default_rng(SEED), {}
    for entry in session.get_overridable_initializers():
        kind = KNOWN.get(entry.type, "")
        if kind.startswith("float") and all(isinstance(size, int) for size in entry.shape):
            others[entry.name] = generator.standard_normal(entry.shape).astype(kind)
    if others:
        yield "initializers overridden", {**first, **others}
