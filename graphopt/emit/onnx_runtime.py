"""An ONNX file in ONNX Runtime, held to the program it was made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import MissingDependencyError, VerificationError
from graphopt.program import Program
from graphopt.rewrite.rule import Numeric
from graphopt.signature import OutputKind
from graphopt.verify.inputs import sizes_of_one
from graphopt.verify.measure import SENSITIVE, Measure, compare, worst
from graphopt.verify.trials import fresh_or_refused, rounded_runs, unseen_or_refused
from graphopt.verify.unrounded import rounded, unrounded
from graphopt.verify.whole import Outcome, run_program

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative RMS error against float64: ONNX Runtime's kernels round in their own order."""


def require(*packages: str) -> None:
    missing = [p for p in packages if find_spec(p) is None]
    if missing:
        raise MissingDependencyError(
            f"ONNX export needs {' and '.join(missing)}", fix="pip install 'graphopt[onnx]'"
        )


def compare_with_runtime(
    program: Program,
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    allowed: float = 0.0,
) -> tuple[Measure, list[str]]:
    """Run the file on captured and unseen sizes, and at 1; the worst measure over all outputs.

    Outputs may be off by `TOLERANCE`, or by ``allowed`` where that is more: what rounding
    activations changed of them on the captured inputs, if the file does that. A model that
    magnifies rounding, or rounds activations, is held to its own error where that is larger; a
    file that rounds them, to what that costs the model on the same inputs. Attention that
    may see nothing is zero in torch and something else in ONNX. Where a drawn mask has such rows,
    the comparison is made without them, and the notes say so.

    Raises:
        VerificationError: names the output that differs, and by how much.
    """
    exact = unrounded(program)
    twin = rounded(program) if allowed else program
    session, checked = open_session(path), (inputs, outputs, exact, allowed, twin)
    rows = _compare_once(program, session, program.example_inputs, *checked)
    notes: dict[str, None] = {}
    small = (fresh_or_refused(program, sizes) for sizes in sizes_of_one(program))
    for values, refused in (unseen_or_refused(program), *small):
        if refused is not None:
            notes[f"random inputs were not tried: {refused}"] = None
            continue
        try:
            rows += _compare_once(program, session, values, *checked)
        except VerificationError:
            filled = _with_no_empty_rows(program, values)
            nodes = program.user_inputs()
            names = [n.name for n, a, b in zip(nodes, values, filled, strict=True) if a is not b]
            if not names:
                raise
            rows += _compare_once(program, session, filled, *checked)
            notes[_EMPTY.format(" and ".join(names))] = None
    return worst(rows), list(notes)


_EMPTY = "rows of {} that are all zero: ONNX Runtime gives other values than torch there"


def _with_no_empty_rows(program: Program, values: Sequence[Any]) -> list[Any]:
    """The same inputs, but rows of masks that are all zero get a first entry.

    A mask is a tensor of zeros and ones that had no such row when the model was captured.
    """
    return [_filled(*pair) for pair in zip(program.example_inputs, values, strict=True)]


def _filled(captured: Any, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_floating_point() or not value.dim():
        return value
    empty = ~value.bool().any(-1)
    is_mask = bool(((captured == 0) | (captured == 1)).all() and captured.bool().any(-1).all())
    if not is_mask or not empty.any():
        return value
    filled = value.clone()
    filled[..., 0] = value[..., 0] | empty.to(value.dtype)
    return filled


def _compare_once(
    program: Program,
    session: Any,
    values: Sequence[Any],
    inputs: Sequence[str],
    outputs: Sequence[str],
    reference: Program,
    allowed: float,
    twin: Program,
) -> list[Measure]:
    mutated = sum(o.kind is not OutputKind.USER for o in program.outputs)
    old = run_program(program, values, wide=False, grad=False).outputs[mutated:]
    exact = run_program(reference, values, wide=True, grad=False).outputs[mutated:]
    new = [torch.from_numpy(a) for a in session.run(None, feed_of(session, values, inputs))][
        mutated:
    ]
    wanted = [i for i, o in enumerate(old) if isinstance(o, Tensor)]
    capped = SENSITIVE if reference is program else math.inf
    spreads = [(cache(partial(_drawn, program, values)), capped)]
    if twin is not program:
        spreads.append((cache(partial(_drawn, twin, values)), math.inf))
    rows = []
    for name, i, n in zip(outputs, wanted, new, strict=False):
        if n.is_floating_point():  # a file in half precision of a program in float32
            n = n.to(old[i].dtype)
        tolerance = max(TOLERANCE.get(old[i].dtype, 0.0), allowed)
        found = compare(old[i], n, exact[i], Numeric.LOSSY, tolerance)
        for spread, sensitive in spreads:
            if not found.ok:
                own, *drawn = (run.outputs[mutated:][i] for run in spread())
                options: Any = {"rounded": drawn, "sensitive": sensitive}
                again = compare(own, n, exact[i], Numeric.REASSOCIATED, **options)
                found = again if again.ok else found
        if not found.ok:
            raise VerificationError(
                f"ONNX Runtime gives another {name!r}: relative error {found.rms:.2g} "
                f"({found.note}), allowed {tolerance:.0e}",
                fix="nothing was written; fuse=False shows whether a fusion is at fault",
            )
        rows.append(found)
    return rows


def _drawn(program: Program, values: Sequence[Any]) -> list[Outcome]:
    """A run of the program, and runs with random rounding."""
    own = run_program(program, values, wide=False, grad=False)
    return [own, *rounded_runs(program, values)]


def feed_of(session: Any, values: Sequence[Any], inputs: Sequence[str]) -> dict[str, Any]:
    """Flat user inputs by the names of those the file still has, in the halves that it reads."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    kinds = {i.name: i.type for i in session.get_inputs()}
    halves = {n for n, kind in kinds.items() if kind == "tensor(float16)"}
    given = zip(inputs, tensors, strict=True)
    return {n: (t.half() if n in halves else t).numpy() for n, t in given if n in kinds}


def open_session(
    model: Path | bytes,
    settings: Mapping[str, str] | None = None,
    *,
    profile: Path | None = None,
) -> Any:
    """An ONNX Runtime session on the CPU with torch's number of threads.

    Args:
        settings: entries of the session's configuration.
        profile: what the file begins with that ONNX Runtime's profiler writes.
    """
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    for name, value in (settings or {}).items():
        options.add_session_config_entry(name, value)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    given = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        first = str(error).splitlines()[0]
        raise VerificationError(f"ONNX Runtime cannot load the file: {first}") from error
