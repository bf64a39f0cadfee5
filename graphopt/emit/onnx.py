"""Writing ONNX: translated by torch, fused for ONNX Runtime, compared before it is put in place."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from graphopt.emit.module import OptimizedModule
from graphopt.emit.onnx_drafts import Draft, Names, best_draft, save_model, tied_draft
from graphopt.emit.onnx_half_choice import check_dtype, halve
from graphopt.emit.onnx_quantized import calls_of
from graphopt.emit.onnx_runtime import compare_with_runtime, require
from graphopt.emit.onnx_spelled import spelled_for_runtime
from graphopt.emit.onnx_translate import input_names, output_names
from graphopt.emit.unchunked import unchunked
from graphopt.errors import ExportError, VerificationError
from graphopt.files import atomic_path
from graphopt.kernels.quantized.remainder import weight_beside
from graphopt.program import Program
from graphopt.signature import Assumption


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
    names: Names | None = None,
    dtype: str | None = None,
    one_copy: bool = False,
) -> OnnxResult:
    """Write ``module`` as an ONNX file that ONNX Runtime was seen to run with equal outputs.

    Args:
        module: an ahead-of-time result of `graphopt.compile`, captured in eval mode.
        opset: ONNX operator set; the exporter's own choice by default.
        fuse: apply ONNX Runtime's operator fusions (operators of ``com.microsoft``).
        verify: run the file in ONNX Runtime on captured and on unseen sizes before it is put in
            place.
        measure: time forms of the program in ONNX Runtime, and write the fastest. Without it, the
            same program gives the same bytes.
        names: what the file calls its tensor inputs and its outputs, in their flat order; by
            default as the model does.
        dtype: ``float16`` or ``bfloat16`` for a program of float32 in half precision, ``mixed`` for
            float16 that takes and gives float32. Operators stay float32 where outputs would be
            off by more than `TOLERANCE` of that dtype, and by more than 3 times what half weights,
            inputs and outputs cost; ``notes`` say which. ``bfloat16`` needs ``verify=False``: the
            CPU provider of ONNX Runtime does not run it.
        one_copy: a weight that an embedding and a head share is in memory once, in sessions with
            usual settings too; its products of few rows are slower, and ``notes`` say how much.

    Raises:
        ExportError: ``path`` does not end in ``.onnx``, the module trains, an operator has no
            translation (named, with its line), ``names`` are too few or too many, or the exporter
            does not write that ``opset`` for this model.
        VerificationError: ONNX Runtime's outputs are not those of the module.
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
    """
    check_target(path, verify=verify, dtype=dtype)
    program = _exportable(module)
    check_dtype(program, dtype)
    check_opset(opset)
    names = _names(program, names)
    drafted = partial(
        best_draft, program, names, fuse=fuse, opset=opset, verify=verify, measure=measure,
        sums=dtype is None,
    )  # fmt: skip
    finished = partial(
        _finished, program, names, opset=opset, measure=measure, dtype=dtype, one_copy=one_copy
    )
    write = partial(_written, program, names, Path(path), _metadata(module, dtype), verify=verify)
    draft, allowed = finished(drafted())
    try:
        return write(draft, allowed)
    except VerificationError as error:
        if not draft.lowering.tolerance:
            raise
        first, most = error, draft.lowering.most_rounded()
    try:
        made = write(*finished(drafted(rounds=lambda name: name not in most)))
        others = f" and {len(most) - 1} others" if len(most) > 1 else ""
        told = f"`{min(most)}`{others}: activations are not rounded, though that were faster"
    except VerificationError:
        made = write(*finished(drafted(rounds=lambda _name: False)))
        told = "activations are not rounded, though that were faster"
    return replace(made, notes=(*made.notes, f"{told}: {first.what}"))


def _finished(
    program: Program,
    names: Names,
    draft: Draft,
    *,
    opset: int | None,
    measure: bool,
    dtype: str | None,
    one_copy: bool,
) -> tuple[Draft, float]:
    """The draft with equal weights once, in its dtype, and what outputs may be off by."""
    timed = measure and find_spec("onnxruntime") is not None
    draft = tied_draft(draft, names, timed=timed, one_copy=one_copy)
    allowed = draft.lowering.tolerance
    if dtype is not None:
        halved = halve(program, draft.model.model, names, dtype)
        draft = replace(draft, model=_holding(draft.model, halved.model))
        draft = replace(draft, notes=(*draft.notes, *halved.notes))
        allowed = max(allowed, halved.bound)
    check_opset(opset, draft.model.model.opset_imports.get(""))
    return draft, allowed


def _written(
    program: Program,
    names: Names,
    target: Path,
    metadata: str,
    draft: Draft,
    allowed: float,
    *,
    verify: bool,
) -> OnnxResult:
    """The file, compared before it is put in place.

    Raises:
        VerificationError: its outputs are off by more.
    """
    draft.model.model.metadata_props["graphopt"] = metadata
    with atomic_path(target) as temporary:
        save_model(draft.model, temporary, program)
        unchecked = (
            f"calls must keep to this, the file cannot: {_told(a)}" for a in program.assumptions
        )
        error, notes = None, (*draft.lowering.notes(), *draft.notes, *unchecked)
        if verify:
            found, seen = compare_with_runtime(program, temporary, *names, allowed=allowed)
            error, notes = found.rms, (*notes, *seen)
    size = target.stat().st_size
    return OnnxResult(target, *names, draft.fusions, error, size, notes)


def _holding(program: Any, model: Any) -> Any:
    twin = copy.copy(program)
    twin.model = model
    return twin


def check_target(
    path: str | Path, *, training: bool = False, verify: bool = True, dtype: str | None = None
) -> None:
    """Refuse at once what `export_onnx` would refuse after capture and optimization.

    Raises:
        ExportError: ``path`` does not end in ``.onnx``, ``training`` is asked for, or there is no
            such ``dtype``, or none that can be verified.
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
    check_dtype(None, dtype, verify=verify)
    require("onnxscript", "onnx", *(["onnxruntime"] if verify or dtype else []))


def _names(program: Program, given: Names | None) -> Names:
    own = input_names(program), output_names(program)
    if given is None:
        return own
    for kind, names, wanted in zip(("inputs", "outputs"), given, own, strict=True):
        if len(names) != len(wanted) or len(set(names)) != len(names):
            raise ExportError(
                f"{len(names)} names for {len(wanted)} {kind}, each of which has one of its own",
                where="names",
                fix=f"name {', '.join(wanted)} in this order",
            )
    return given


def check_opset(opset: int | None, written: int | None = None) -> None:
    """Refuse an operator set that onnx does not know, or that is not the one ``written``.

    Raises:
        ExportError: says which.
    """
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


def _metadata(module: OptimizedModule, dtype: str | None) -> str:
    """What made the file, without dates and paths: versions, recipe, and what was compared."""
    report = module.report
    certificates = [
        {
            "rule": c.rule,
            "version": c.version,
            "inputs": c.inputs_hash,
            "error": c.error,
            "bound": c.bound,
        }
        for c in report.certificates
    ]
    facts = {
        "versions": {name: version(name) for name in ("graphopt", "torch", "onnxscript")},
        "dtype": dtype or "as captured",
        "recipe": report.recipe,
        "certificates": certificates,
    }
    return json.dumps(facts)
