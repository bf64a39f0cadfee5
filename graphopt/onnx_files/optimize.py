"""``graphopt.optimize_onnx``: an ONNX file in, a verified and smaller or faster one out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graphopt.emit.onnx_runtime import require
from graphopt.errors import GraphoptError, VerificationError
from graphopt.files import atomic_path
from graphopt.onnx_files.document import (
    Document,
    file_hash,
    read_document,
    session_of,
    write_model,
)
from graphopt.onnx_files.examine import Examiner
from graphopt.onnx_files.feeds import Feeds, feeds_for
from graphopt.onnx_files.origins import sources
from graphopt.onnx_files.pipeline import VERSION, Pipeline, Result, pace_of
from graphopt.onnx_files.quantize import check_calibration
from graphopt.onnx_files.quantized_summary import summary
from graphopt.onnx_files.recipe import Recipe, resolve_onnx, to_recipe
from graphopt.onnx_files.steps import OnnxPass, Surroundings
from graphopt.onnx_files.views import node_views
from graphopt.recipe import environment
from graphopt.report.model import Applied, MissedRewrite, Report
from graphopt.report.text import bytes_text, seconds_text
from graphopt.rewrite.rule import Numeric

Step = Callable[[str], None]
_ORDER = [kind.value for kind in (Numeric.BITWISE, Numeric.REASSOCIATED, Numeric.LOSSY)]


@dataclass(frozen=True)
class OnnxFileResult:
    """What became of an ONNX file.

    Attributes:
        path: the file that was written.
        report: what was applied, what was missed and why, and certificates.
        bytes: of the file and its external data, before and after.
        seconds: median time of a run in ONNX Runtime, before and after; None where it was not
            measured.
        external: files of external data that belong to ``path``.
    """

    path: Path
    report: Report
    bytes: tuple[int, int]
    seconds: tuple[float, float] | None = None
    external: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        facts = {**asdict(replace(self, report=Report(""))), "report": self.report.to_dict()}
        return {**facts, "path": str(self.path), "external": [str(p) for p in self.external]}


def optimize_onnx(
    path: str | Path,
    output: str | Path,
    *,
    passes: Recipe = "exact",
    inputs: Mapping[str, Any] | None = None,
    calibration: Sequence[Mapping[str, Any]] = (),
    strict: bool = False,
    measure: bool = True,
    progress: Step = lambda _text: None,
) -> OnnxFileResult:
    """Rewrite an ONNX file; what is written was seen to compute the same in ONNX Runtime.

    Args:
        output: a file that ends in ``.onnx``; external data, where there is some, goes beside it.
        passes: a preset (``"exact"``, ``"balanced"``), a recipe file, or passes.
        inputs: one value for each input by name; drawn from the declared types where not given.
        calibration: further inputs, which outputs are compared on too.
        strict: raise where a rewrite does not verify, instead of taking it back.
        measure: keep only what is not slower in ONNX Runtime on this machine.

    Raises:
        LoadError: the file is damaged, or its external data lies outside of its folder.
        VerificationError: ONNX Runtime does not run the file, or what would be written does not
            compute the same. Nothing is written then.
        RecipeError: a pass or an option that does not fit ONNX files.
    """
    source, target = Path(path), Path(output)
    _check_target(source, target)
    steps = resolve_onnx(passes)
    progress("load")
    document = read_document(source)
    _check_data(document, target)
    start = time.perf_counter()
    report = Report(source.name, recipe=to_recipe(steps), environment=environment_of_onnx())
    given = tensors(inputs), [tensors(batch) or {} for batch in calibration]
    feeds, model = _prepared(document, *given)
    around = Surroundings(model, feeds, document.external, measure, progress)
    result, examiner = _rewritten(steps, document, around, report, strict=strict)
    _fill(report, document, result, examiner)
    seconds = _timed(document, result, around)
    progress(f"write {target.name}")
    with atomic_path(target) as temporary:
        _write(document, result, report, temporary)
        _compare_file(temporary, examiner, result, report)
    size = _size(document.path, document.data), _size(target, _data_of(target))
    report.seconds["optimize"] = time.perf_counter() - start
    report.notes += _figures(size, seconds)
    return OnnxFileResult(target, report, size, seconds, _data_of(target))


def _rewritten(
    steps: Sequence[OnnxPass],
    document: Document,
    around: Surroundings,
    report: Report,
    *,
    strict: bool,
) -> tuple[Result, Examiner | None]:
    """The passes on the model; where it cannot be held whole, none of them."""
    if document.model is None:
        report.missed += _left_alone(steps, document.lacking)
        return Result(None), None
    for step in steps:
        check_calibration(step, around)
    around.progress("run the original")
    examiner = Examiner(document.model, around.feeds, external=document.external)
    return Pipeline(examiner, around, strict).run(document.model, steps), examiner


def _check_target(source: Path, target: Path) -> None:
    if target.suffix != ".onnx":
        raise GraphoptError(
            "an ONNX file ends in .onnx", where=str(target), fix=f"write {target.stem}.onnx"
        )
    if target.resolve() == source.resolve():
        raise GraphoptError(
            "the output would overwrite a file that it is made from",
            where=str(target),
            fix="write to another name",
        )
    require("onnx", "onnxscript", "onnxruntime")


def _check_data(document: Document, target: Path) -> None:
    beside = target.with_name(f"{target.name}.data").resolve()
    if beside in {path.resolve() for path in document.data}:
        raise GraphoptError(
            "the output's external data would overwrite that of the original",
            where=str(beside),
            fix="write to another name or folder",
        )


def environment_of_onnx() -> dict[str, str]:
    """Machine and versions, those of onnx, onnxscript and ONNX Runtime among them."""
    import onnx
    import onnxruntime
    import onnxscript

    versions = {m.__name__: m.__version__ for m in (onnx, onnxruntime, onnxscript)}
    return {**environment(), **versions}


def tensors(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Arrays that torch knows as tensors; sequences and the like as they are."""
    import numpy as np

    if values is None:
        return None
    plain = {n: v for n, v in values.items() if isinstance(v, np.ndarray) and v.dtype.isbuiltin}
    numbers = {n: torch.from_numpy(v) for n, v in plain.items() if v.dtype.kind in "biufc"}
    return {**values, **numbers}


def _prepared(
    document: Document, inputs: Mapping[str, Any] | None, batches: Sequence[Mapping[str, Any]]
) -> tuple[Feeds, Any]:
    if document.model is None:
        return Feeds({}), None
    session = session_of(document.model, external=document.external)
    return feeds_for(session, document.path, inputs, batches), document.model


def _left_alone(steps: Sequence[OnnxPass], reason: str) -> list[MissedRewrite]:
    names = dict.fromkeys(step.name for step in steps)
    told = f"{reason}, which rewriting would lose"
    return [MissedRewrite(name, name, told) for name in names]


def _fill(report: Report, document: Document, result: Result, examiner: Examiner | None) -> None:
    lines = {} if document.model is None else sources(document.model)
    report.applied, report.passes = [_placed(a, lines) for a in result.applied], result.passes
    report.missed += [replace(m, source=lines.get(m.node or "")) for m in result.missed]
    report.notes += result.notes
    if examiner is not None and result.layers:
        report.quantization = summary(result, examiner)
    if examiner is not None:
        report.notes += examiner.notes
        made = {name: (a.rule,) for a in result.applied for name in a.added}
        report.graph_before = node_views(document.model)
        report.graph_after = node_views(result.model, made)


def _placed(applied: Applied, lines: Mapping[str, str]) -> Applied:
    """With the line of the first node that went, where the file says it."""
    source = next((lines[name] for name in applied.removed if name in lines), None)
    proof = replace(applied.certificate, source=source)
    return replace(applied, source=source, certificate=proof)


def _timed(document: Document, result: Result, around: Surroundings) -> tuple[float, float] | None:
    if not around.measure or document.model is None:
        return None
    if not result.applied:
        pace = pace_of(document.model, document.model, around)
        return pace.old, pace.old
    around.progress("time the whole")
    pace = pace_of(document.model, result.model, around)
    return pace.old, pace.new


def _write(document: Document, result: Result, report: Report, path: Path) -> None:
    """The file as it was where nothing was rewritten, and what graphopt knows of it."""
    facts = json.dumps(_metadata(document, report), sort_keys=True)
    if document.model is None:
        _write_proto(document, facts, path)
        return
    model = result.model if result.applied else document.model.clone()
    model.metadata_props["graphopt"] = facts
    write_model(model, path, external=document.external)


def _write_proto(document: Document, facts: str, path: Path) -> None:
    """What no rewriter reads whole: the same messages, with external data brought inside."""
    import onnx

    proto = onnx.ModelProto()
    proto.CopyFrom(document.proto)
    if document.external:
        onnx.load_external_data_for_model(proto, str(document.path.parent))
    onnx.helper.set_model_props(proto, {p.key: p.value for p in proto.metadata_props} | {
        "graphopt": facts
    })  # fmt: skip
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _metadata(document: Document, report: Report) -> dict[str, Any]:
    certificates = [
        {"rule": c.rule, "version": c.version, "error": c.error, "inputs": c.inputs_hash}
        for c in report.certificates
        if math.isfinite(c.error)
    ]
    return {"recipe": report.recipe, "certificates": certificates, "source": file_hash(document)}


def _compare_file(
    path: Path,
    examiner: Examiner | None,
    result: Result,
    report: Report,
) -> None:
    """Hold what was written, as it lies on disk, to the original.

    Raises:
        VerificationError: it does not compute the same.
    """
    written = read_document(path)
    if examiner is None:
        report.verified = True
        report.notes.append("the file is written as it was: nothing in it was rewritten")
        return
    if written.model is None:
        raise VerificationError(f"the file that was written cannot be read: {written.lacking}")
    try:
        found = examiner.examine(written.model, result.allowed)
    except VerificationError as error:
        raise VerificationError(
            f"the optimized file is not the original: {error.what}",
            fix="nothing was written; --pass NAME runs passes one by one",
        ) from error
    kinds = [a.certificate.numeric for a in result.applied]
    numeric = max(kinds, key=_ORDER.index, default=_ORDER[0])
    proof = examiner.certificate(found, rule="whole file", version=VERSION, numeric=numeric)
    report.whole.append(proof)
    report.verified = True


def _data_of(path: Path) -> tuple[Path, ...]:
    beside = path.with_name(f"{path.name}.data")
    return (beside,) if beside.is_file() and _names(path, beside.name) else ()


def _names(path: Path, location: str) -> bool:
    from graphopt.loading.onnx_files import check_external_data

    return any(found.name == location for found in check_external_data(path))


def _size(path: Path, data: Sequence[Path]) -> int:
    return sum(p.stat().st_size for p in (path, *data))


def _figures(size: tuple[int, int], seconds: tuple[float, float] | None) -> list[str]:
    notes = [f"file: {bytes_text(size[0])} before, {bytes_text(size[1])} after"]
    if seconds is not None:
        before, after = seconds
        ratio = f"{before / after:.2f}x the speed" if after else ""
        notes.append(
            f"a run in ONNX Runtime: {seconds_text(before)} before, {seconds_text(after)} after, "
            f"{ratio}"
        )
    return notes
