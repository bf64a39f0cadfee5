"""Writing ONNX: translated by torch, fused for ONNX Runtime, compared before it is put in place."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from graphopt.emit.module import OptimizedModule
from graphopt.emit.onnx_axes import name_axes
from graphopt.emit.onnx_quantized import Lowering, calls_of, lower, lower_merged
from graphopt.emit.onnx_runtime import compare_with_runtime, feed_of, open_session, require
from graphopt.emit.onnx_spelled import spelled_for_runtime
from graphopt.emit.onnx_sums import FUSIONS, sums_apart
from graphopt.emit.onnx_translate import fuse_for_runtime, input_names, output_names, translate
from graphopt.emit.onnx_variants import separate_projections
from graphopt.emit.unchunked import unchunked
from graphopt.errors import ExportError
from graphopt.files import atomic_path
from graphopt.kernels.quantized.remainder import weight_beside
from graphopt.program import Program
from graphopt.signature import Assumption
from graphopt.verify.timing import Pace, interleaved

EXTERNAL_ABOVE = 1_800_000_000
"""Bytes of weights above which they go to a file beside the model (protobuf ends at 2 GB)."""


@dataclass(frozen=True)
class OnnxResult:
    """What was written: names as the model gave them, fusions by kind, the measured error.

    ``error`` is the largest relative error in ONNX Runtime, ``None`` where it was not compared.
    ``notes`` tell which of several forms ONNX Runtime was seen to run fastest, for which inputs its
    results are not torch's, and which conditions on sizes the module checks but the file cannot.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    fusions: dict[str, int]
    error: float | None
    bytes: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    def lines(self) -> list[str]:
        """What was written, in plain text."""
        fused = ", ".join(f"{n} {name}" for name, n in sorted(self.fusions.items()))
        error = "not compared" if self.error is None else f"{self.error:.1e}"
        return [
            f"wrote {self.path} ({self.bytes / 1e6:.1f} MB)",
            f"inputs: {', '.join(self.inputs)}; outputs: {', '.join(self.outputs)}",
            f"fusions: {fused or 'none'}",
            f"largest relative error in ONNX Runtime: {error}",
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
        ExportError: ``path`` does not end in ``.onnx``, the module trains, an operator has no
            translation (named, with its line), or the exporter does not write that ``opset`` for
            this model.
        VerificationError: ONNX Runtime's outputs are not those of the module.
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
    """
    check_target(path, verify=verify)
    program = _exportable(module)
    _check_opset(opset)
    names = input_names(program), output_names(program)
    options: dict[str, Any] = {
        "opset": opset,
        "standard": not fuse,
        "verify": verify,
        "measure": measure,
    }
    draft = _draft(lower(program, **options), names, fuse=fuse)
    if fuse and measure and find_spec("onnxruntime"):
        draft = _faster(draft, names)
        draft = _merged(draft, lower_merged(program, draft.lowering, **options), names)
        draft = _summed(draft, names)
    lowering = draft.lowering
    _check_opset(opset, draft.model.model.opset_imports.get(""))
    draft.model.model.metadata_props["graphopt"] = _metadata(module)
    target, conditions = Path(path), program.assumptions
    with atomic_path(target) as temporary:
        _save(draft.model, temporary, program)
        unchecked = (f"calls must keep to this, the file cannot: {_told(a)}" for a in conditions)
        error, notes = None, (*lowering.notes(), *draft.notes, *unchecked)
        if verify:
            allowed = lowering.tolerance
            found, seen = compare_with_runtime(program, temporary, *names, allowed=allowed)
            error, notes = found.rms, (*notes, *seen)
    size = target.stat().st_size
    return OnnxResult(target, *names, draft.fusions, error, size, notes)


def check_target(path: str | Path, *, training: bool = False, verify: bool = True) -> None:
    """Refuse at once what `export_onnx` would refuse after capture and optimization.

    Raises:
        ExportError: ``path`` does not end in ``.onnx``, or ``training`` is asked for.
        MissingDependencyError: a package that export needs is not installed.
    """
    if Path(path).suffix != ".onnx":
        raise ExportError(
            "an ONNX file ends in .onnx", where=str(path), fix=f"write {Path(path).stem}.onnx"
        )
    if training:
        raise ExportError(
            "an ONNX file cannot hold a model in training mode",
            where=str(path),
            fix="leave --train out",
        )
    require("onnxscript", "onnx", *(["onnxruntime"] if verify else []))


def _check_opset(opset: int | None, written: int | None = None) -> None:
    """Refuse an operator set that onnx does not know, or that is not the one ``written``."""
    if opset is None or opset == written:
        return
    from onnx.defs import onnx_opset_version

    known = type(opset) is int and 1 <= opset <= onnx_opset_version()
    if written is not None or not known:
        given = "" if written is None else f", the exporter gave {written}"
        raise ExportError(
            f"cannot write operator set {opset!r}{given}",
            where="opset",
            fix="leave it out, or take one from 18 upward that the installed exporter knows",
        )


def _told(assumption: Assumption) -> str:
    return assumption.reason or assumption.text


@dataclass(frozen=True)
class _Draft:
    """A model, what it was made of, and what there is to tell of the choice."""

    lowering: Lowering
    model: Any
    fusions: dict[str, int]
    notes: tuple[str, ...] = ()


Names = tuple[tuple[str, ...], tuple[str, ...]]


def _draft(lowering: Lowering, names: Names, *, fuse: bool) -> _Draft:
    model = translate(lowering.program, *names, opset=lowering.opset, standard=not fuse)
    fusions = fuse_for_runtime(model) if fuse else {}
    lowering.place(model.model)
    name_axes(model.model, lowering.program)
    return _Draft(lowering, model, fusions)


def _faster(draft: _Draft, names: Names) -> _Draft:
    """The draft, or one with separate projections if ONNX Runtime runs that faster."""
    lowering = draft.lowering
    apart = separate_projections(lowering.program)
    other = draft if apart is None else _draft(replace(lowering, program=apart), names, fuse=True)
    if other.fusions.get("attention", 0) <= draft.fusions.get("attention", 0):
        return draft
    told = ("query, key and value as separate products", "one merged product", "left merged")
    return _winner(draft, other, names, told)


def _merged(draft: _Draft, lowering: Lowering | None, names: Names) -> _Draft:
    """The draft, or one with quantized products of one input as one if that is faster."""
    if lowering is None:
        return draft
    other = _draft(lowering, names, fuse=True)
    told = ("quantized products of one input as one", "products by themselves", "left apart")
    return _winner(draft, other, names, told)


def _summed(draft: _Draft, names: Names) -> _Draft:
    """The draft, or one in which additions before norms stand by themselves if that is faster."""
    apart = sums_apart(draft.model)
    if apart is None:
        return draft
    fusions = {name: count for name, count in draft.fusions.items() if name not in FUSIONS}
    other = replace(draft, model=apart, fusions=fusions)
    told = ("norms apart from the additions before them", "one operator", "left as one")
    return _winner(draft, other, names, told)


def _winner(draft: _Draft, other: _Draft, names: Names, told: tuple[str, str, str]) -> _Draft:
    """The one that ONNX Runtime runs faster, with a note of what was compared with what."""
    pace = _race(draft, other, names[0])
    what, than, left = told
    note = f"{what}: {pace.old / pace.new:.2f}x the speed of {than} in ONNX Runtime"
    if pace.new > pace.old:
        return replace(draft, notes=(*draft.notes, f"{note}; {left}"))
    return replace(other, notes=(*draft.notes, note))


def _race(one: _Draft, two: _Draft, inputs: Sequence[str]) -> Pace:
    """Both in turn on the captured inputs."""
    with tempfile.TemporaryDirectory() as folder:
        calls = []
        for index, draft in enumerate((one, two)):
            path, program = Path(folder) / f"{index}.onnx", draft.lowering.program
            _save(draft.model, path, program)
            session = open_session(path)
            feed = feed_of(session, program.example_inputs, inputs)
            calls.append(partial(session.run, None, feed))
        return interleaved(calls[0], calls[1], budget=1.0)


def _exportable(module: OptimizedModule) -> Program:
    if not isinstance(module, OptimizedModule):
        raise ExportError(
            f"cannot export a {type(module).__name__}",
            fix="export what graphopt.compile(model, example_inputs=...) returned",
        )
    program = module.current_program()
    check_program(program)
    return spelled_for_runtime(unchunked(program))


def check_program(program: Program) -> None:
    """Refuse what no ONNX file can hold.

    Raises:
        ExportError: the program trains, keeps state between calls, or reads quantized weights that
            are computed or laid out for one machine.
    """
    calls_of(program)
    sparse = (name for name in program.state if "_numbers_starts" in name)
    weights = (weight_beside(name, program.state) for name in sparse)
    if (weight := next(filter(None, weights), None)) is not None:
        raise ExportError(
            f"{weight} keeps single numbers beside its codes, and ONNX has no sparse product",
            where=weight,
            fix="quantize with outlier_kind='columns', or save a .pt2",
        )
    kinds = {"quantized_experts": "mixtures of experts", "quantized_conv": "convolutions"}
    found = {str(getattr(n.target, "_opname", "")) for n in program.graph.nodes}
    if told := [told for name, told in kinds.items() if name in found]:
        raise ExportError(
            f"{program.name} has quantized {' and '.join(told)}, which have no ONNX form yet",
            fix="name them in QuantizeMatmul:skip for ONNX, or write a .pt2",
        )
    if program.training:
        raise ExportError(
            f"{program.name} was captured in training mode", fix="capture it after model.eval()"
        )
    if updated := sorted(program.mutated_state()):
        raise ExportError(
            f"the model updates its buffer {updated[0]!r} on every call, and an ONNX file keeps no "
            "state between runs",
            fix="take the state as an input and return its new value",
        )


def _metadata(module: OptimizedModule) -> str:
    report = module.report
    certificates = [
        {"rule": c.rule, "version": c.version, "error": c.error, "inputs": c.inputs_hash}
        for c in report.certificates
    ]
    return json.dumps({"recipe": report.recipe, "certificates": certificates})


def _save(model: Any, path: Path, program: Program) -> None:
    size = sum(t.numel() * t.element_size() for t in program.state.values())
    model.save(str(path), external_data=size > EXTERNAL_ABOVE)
