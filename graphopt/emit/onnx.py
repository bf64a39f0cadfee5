"""Writing ONNX: translated by torch, fused for ONNX Runtime, compared before it is put in place."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.emit.exported import to_exported
from graphopt.emit.module import OptimizedModule
from graphopt.emit.onnx_axes import name_axes
from graphopt.emit.onnx_variants import separate_projections
from graphopt.errors import ExportError, MissingDependencyError, VerificationError
from graphopt.files import atomic_path
from graphopt.program import InputKind, OutputKind, Program
from graphopt.rewrite.rule import Numeric
from graphopt.verify.inputs import fresh_inputs, sizes_of_one, unseen_sizes
from graphopt.verify.measure import Measure, compare, worst
from graphopt.verify.timing import Pace, interleaved
from graphopt.verify.whole import run_program

EXTERNAL_ABOVE = 1_800_000_000
"""Bytes of weights above which they go to a file beside the model (protobuf ends at 2 GB)."""

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest relative RMS error against float64: ONNX Runtime's kernels round in their own order."""


@dataclass(frozen=True)
class OnnxResult:
    """What was written: names as the model gave them, fusions by kind, the measured error.

    ``notes`` tell which of several forms ONNX Runtime was seen to run fastest.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fusions: dict[str, int]
    error: float
    bytes: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    def lines(self) -> list[str]:
        """What was written, in plain text."""
        fused = ", ".join(f"{n} {name}" for name, n in sorted(self.fusions.items()))
        return [
            f"wrote {self.path} ({self.bytes / 1e6:.1f} MB)",
            f"inputs: {', '.join(self.inputs)}; outputs: {', '.join(self.outputs)}",
            f"fusions: {fused or 'none'}",
            f"largest relative error in ONNX Runtime: {self.error:.1e}",
            *self.notes,
        ]


def export_onnx(
    module: OptimizedModule,
    path: str | Path,
    *,
    opset: int | None = None,
    fuse: bool = True,
    verify: bool = True,
    measure: bool = True,
) -> OnnxResult:
    """Write ``module`` as an ONNX file that ONNX Runtime was seen to run with equal outputs.

    Args:
        module: an ahead-of-time result of `graphopt.compile`, captured in eval mode.
        opset: ONNX operator set; the exporter's own choice by default.
        fuse: apply ONNX Runtime's operator fusions (operators of ``com.microsoft``).
        verify: run the file in ONNX Runtime on captured and on unseen sizes before it is put in
            place.

    Raises:
        ExportError: the module trains, or an operator has no translation (named, with its line).
        VerificationError: ONNX Runtime's outputs are not those of the module.
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
    """
    _require("onnxscript", "onnx")
    program = _exportable(module)
    names = input_names(program), output_names(program)
    draft = _draft(program, names, opset, fuse=fuse)
    if fuse and measure and find_spec("onnxruntime"):
        draft = _faster(draft, program, names, opset)
    draft.model.model.metadata_props["graphopt"] = _metadata(module)
    target = Path(path)
    with atomic_path(target) as temporary:
        _save(draft.model, temporary, program)
        error = compare_with_runtime(program, temporary, *names).rms if verify else float("nan")
    size = target.stat().st_size
    return OnnxResult(target, *names, draft.fusions, error, size, draft.notes)


@dataclass(frozen=True)
class _Draft:
    model: Any
    fusions: dict[str, int]
    notes: tuple[str, ...] = ()


Names = tuple[tuple[str, ...], tuple[str, ...]]


def _draft(program: Program, names: Names, opset: int | None, *, fuse: bool) -> _Draft:
    model = translate(program, *names, opset=opset)
    fusions = fuse_for_runtime(model) if fuse else {}
    name_axes(model.model, program)
    return _Draft(model, fusions)


def _faster(draft: _Draft, program: Program, names: Names, opset: int | None) -> _Draft:
    """The draft, or one with separate projections if ONNX Runtime runs that faster."""
    apart = separate_projections(program)
    other = _draft(apart, names, opset, fuse=True) if apart is not None else draft
    if other.fusions.get("attention", 0) <= draft.fusions.get("attention", 0):
        return draft
    pace = _race(draft, other, program, names[0])
    ratio = f"{pace.old / pace.new:.2f}x the speed of one merged product"
    note = f"query, key and value as separate products: {ratio} in ONNX Runtime"
    if pace.new > pace.old:
        return replace(draft, notes=(f"{note}; left merged",))
    return replace(other, notes=(note,))


def _race(one: _Draft, two: _Draft, program: Program, inputs: Sequence[str]) -> Pace:
    """Both in turn on the captured inputs."""
    with tempfile.TemporaryDirectory() as folder:
        calls = []
        for index, draft in enumerate((one, two)):
            path = Path(folder) / f"{index}.onnx"
            _save(draft.model, path, program)
            session = open_session(path)
            feed = _feed(session, program.example_inputs, inputs)
            calls.append(partial(session.run, None, feed))
        return interleaved(calls[0], calls[1], budget=1.0)


def _require(*packages: str) -> None:
    missing = [p for p in packages if find_spec(p) is None]
    if missing:
        raise MissingDependencyError(
            f"ONNX export needs {' and '.join(missing)}", fix="pip install 'graphopt[onnx]'"
        )


def _exportable(module: OptimizedModule) -> Program:
    if not isinstance(module, OptimizedModule):
        raise ExportError(
            f"cannot export a {type(module).__name__}",
            fix="export what graphopt.compile(model, example_inputs=...) returned",
        )
    program = module.current_program()
    if program.training:
        raise ExportError(
            f"{program.name} was captured in training mode", fix="capture it after model.eval()"
        )
    return program


def input_names(program: Program) -> tuple[str, ...]:
    """Names of tensor inputs; constants that were captured are part of the file."""
    return tuple(
        n.name
        for n, v in zip(program.user_inputs(), program.example_inputs, strict=True)
        if isinstance(v, Tensor)
    )


def output_names(program: Program) -> tuple[str, ...]:
    """Names from the structure of the return value: fields and keys, else ``output``."""
    values = program.user_outputs()
    if program.call is None:
        return tuple(f"output_{i}" for i in range(len(values)))
    tree = pytree.tree_unflatten(list(range(len(values))), program.call.out_spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    named = [_spell(path) or "output" for path in paths]
    taken = set(input_names(program))
    return tuple(f"{n}_out" if n in taken else n for n in named)


def _spell(path: Sequence[Any]) -> str:
    parts = [getattr(p, "key", getattr(p, "name", getattr(p, "idx", ""))) for p in path]
    text = "_".join(str(p) for p in parts)
    return f"output_{text}" if text[:1].isdigit() else text


def translate(
    program: Program, inputs: Sequence[str], outputs: Sequence[str], *, opset: int | None
) -> Any:
    """The program as a `torch.onnx.ONNXProgram`."""
    mutated = sum(o.kind is not OutputKind.USER for o in program.outputs)
    named = [f"updated_{i}" for i in range(mutated)] + list(outputs)
    try:
        with _quiet():
            made: Any = torch.onnx.export(
                to_exported(program),
                dynamo=True,
                input_names=list(inputs) if _all_tensors(program) else None,
                output_names=named if _all_tensors(program) else None,
                opset_version=opset,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _untranslated(error, program) from error
    return made


def _all_tensors(program: Program) -> bool:
    kinds = (e.kind for e in program.inputs.values())
    return all(isinstance(v, Tensor) for v in program.example_inputs) and InputKind.USER in kinds


def _untranslated(error: Exception, program: Program) -> ExportError:
    import re

    from graphopt.source import source_line

    text = str(error.__cause__ or error)
    found = re.search(r"'(?:<OpOverload\(op=')?([\w.:]+)", text)
    operator = found[1] if found else ""
    where = next((source_line(n) for n in program.graph.nodes if operator in str(n.target)), None)
    first = text.strip().splitlines()[0][:300]
    return ExportError(f"no ONNX translation: {first}", where=where if operator else None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own progress lines and deprecation warnings."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def fuse_for_runtime(model: Any) -> dict[str, int]:
    """Apply onnxscript's fusions for ONNX Runtime in place; returns how many of each kind."""
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    with _quiet():
        fused, counts = optimize_for_ort(model.model)
    model.model = fused
    return {name: count for name, count in counts.items() if count}


def _metadata(module: OptimizedModule) -> str:
    report = module.report
    certificates = [
        {"rule": c.rule, "version": c.version, "error": c.error, "inputs": c.inputs_hash}
        for c in report.certificates
    ]
    return json.dumps({"recipe": report.recipe, "certificates": certificates}, sort_keys=True)


def _save(model: Any, path: Path, program: Program) -> None:
    size = sum(t.numel() * t.element_size() for t in program.state.values())
    model.save(str(path), external_data=size > EXTERNAL_ABOVE)


def compare_with_runtime(
    program: Program, path: Path, inputs: Sequence[str], outputs: Sequence[str]
) -> Measure:
    """Run the file on captured and unseen sizes, and at 1; the worst measure over all outputs.

    Raises:
        VerificationError: names the output that differs, and by how much.
    """
    session = open_session(path)
    sizes = (unseen_sizes(program), *sizes_of_one(program))
    sets = [list(program.example_inputs), *(fresh_inputs(program, s) for s in sizes)]
    rows: list[Measure] = []
    for values in sets:
        rows += _compare_once(program, session, values, inputs, outputs)
    return worst(rows)


def _compare_once(
    program: Program, session: Any, values: list[Any], inputs: Sequence[str], outputs: Sequence[str]
) -> list[Measure]:
    mutated = sum(o.kind is not OutputKind.USER for o in program.outputs)
    old = run_program(program, values, wide=False, grad=False).outputs[mutated:]
    exact = run_program(program, values, wide=True, grad=False).outputs[mutated:]
    new = [torch.from_numpy(a) for a in session.run(None, _feed(session, values, inputs))][mutated:]
    wanted = [(o, e) for o, e in zip(old, exact, strict=True) if isinstance(o, Tensor)]
    rows = []
    for name, (o, e), n in zip(outputs, wanted, new, strict=False):
        tolerance = TOLERANCE.get(o.dtype, 0.0)
        found = compare(o, n, e, Numeric.LOSSY, tolerance)
        if not found.ok:
            raise VerificationError(
                f"ONNX Runtime gives another {name!r}: relative error {found.rms:.2g} "
                f"({found.note}), allowed {tolerance:.0e}",
                fix="nothing was written; fuse=False shows whether a fusion is at fault",
            )
        rows.append(found)
    return rows


def _feed(session: Any, values: Sequence[Any], inputs: Sequence[str]) -> dict[str, Any]:
    """Flat user inputs by the names of those the file still has."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    names = [i.name for i in session.get_inputs()]
    return {n: t.numpy() for n, t in zip(inputs, tensors, strict=True) if n in names}


def open_session(path: Path) -> Any:
    """An ONNX Runtime session on the CPU with torch's number of threads."""
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        first = str(error).splitlines()[0]
        raise VerificationError(f"ONNX Runtime cannot load the file: {first}") from error
