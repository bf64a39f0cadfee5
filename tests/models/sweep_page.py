"""The rows of a sweep as a Markdown page."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from models.sweep_check import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, Row

PAGE = """# What graphopt does to known architectures

Each model below is built with random weights from a small configuration and goes through
`graphopt.compile(model, ...)` with preset `exact`, once in eval mode and once in training mode. The
result is called at the captured size, at batch 1 and at an unseen size, and held against the
original: outputs, and in training mode the gradients of every parameter.

- **axes**: those that stayed dynamic. Where the model fixes one, the last column says so, and the
  row shows the model with that axis left out of `dynamic_shapes`.
- **nodes**: graph nodes before and after.
- **rewrites**: how many were kept, by pass. Nothing is timed here, so none is dropped as slower.
- **outputs**, **gradients**: the largest relative RMS difference from the original in float32. More
  than {forward:.0e} (outputs) or {gradient:.0e} (gradients) is marked as a difference, unless the
  result is as near to the original in float64 as the original in float32 is, with its weights
  moved by a rounding or not.

Made on {date} with {versions}, on {machine}. `make sweep` makes it again.

{summary}

## Hugging Face architectures

{hugging_face}

## Convolutional networks

{cnn}

## Modules that torch itself tests

The first two of torch's own sample inputs for each module of `torch.nn`, in eval and training mode:
{modules}
"""

ONNX_PAGE = """# Which architectures become ONNX files

Each model below is built with random weights from a small configuration, goes in eval mode through
`graphopt.compile(model, ...)` with preset `exact` and `graphopt.export_onnx`, and the file runs in
ONNX Runtime on a CPU. `export_onnx` compares it with the program before it is put in place; here
its outputs are held besides against those of the model itself, at the captured size and at sizes
that were not seen.

- **axes**: those that stayed dynamic. Where a model or its export fixes one, the last column says
  so, and the row shows the model with that axis left out of `dynamic_shapes`.
- **sizes**: unseen ones at which outputs were compared. A size that the model itself does not take
  is not there.
- **outputs**: the largest relative RMS difference from the model in float32. More than
  {forward:.0e} is marked as a difference, unless the file is as near to the model in float64 as the
  model in float32 is, with its weights moved by a rounding or not.
- **refusal**: why there is no file, or not one with more dynamic axes.

Made on {date} with {versions}, on {machine}.
`PYTHONPATH=tests python -m models.sweep --onnx --page docs/onnx_architectures.md` makes it again.

{summary}

| model | family | axes | sizes | outputs | refusal |
| --- | --- | --- | --- | --- | --- |
{rows}
"""

SHORT = {
    "Canonicalize": "canonical",
    "EliminateCommonSubexpressions": "common",
    "FoldConstants": "constants",
    "FoldBatchNorm": "batch norms",
    "RecognizeComposites": "composites",
    "FoldNormAffine": "norm affines",
    "PreRMSNorm": "pre-RMS",
    "MergeProjections": "projections",
}
PACKAGES = ("torch", "transformers", "graphopt")
ONNX_PACKAGES = (*PACKAGES, "onnx", "onnxscript", "onnxruntime")


def page(rows: Sequence[Row]) -> str:
    hugging_face = [r for r in rows if r.family not in ("cnn", "module")]
    modules = [r for r in rows if r.family == "module"]
    return PAGE.format(
        forward=FORWARD_TOLERANCE,
        gradient=GRADIENT_TOLERANCE,
        **_made_with(PACKAGES),
        summary=_summary(hugging_face, "Hugging Face architectures"),
        hugging_face=_table(hugging_face),
        cnn=_table([r for r in rows if r.family == "cnn"]),
        modules=_modules(modules),
    )


def onnx_page(rows: Sequence[Row]) -> str:
    good, wrong = [r for r in rows if _right(r)], [r.name for r in rows if r.wrong]
    whole = [r for r in good if not r.cause]
    refused = [r.name for r in rows if not r.captured]
    return ONNX_PAGE.format(
        forward=FORWARD_TOLERANCE,
        **_made_with(ONNX_PACKAGES),
        summary=f"Of {len(rows)} models, {len(good)} become files whose outputs are those of the "
        f"model, {len(whole)} of them with every axis dynamic. No file: "
        f"{', '.join(refused) or 'none'}. Different from the model: {', '.join(wrong) or 'none'}.",
        rows="\n".join(map(_onnx_line, rows)),
    )


def _onnx_line(row: Row) -> str:
    forward = f"{row.forward:.0e}" if row.captured else ""
    forward += f" **differs at {row.wrong}**" if row.wrong else ""
    sizes = ", ".join(row.sizes[1:])
    cells = [row.name, row.family, ", ".join(row.axes), sizes, forward, _plain(row.cause)]
    return f"| {' | '.join(cells)} |"


def _made_with(packages: Sequence[str]) -> dict[str, object]:
    return {
        "date": datetime.datetime.now(datetime.UTC).date(),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "machine": f"{platform.machine()} CPU, Python {platform.python_version()}",
    }


def _summary(rows: Sequence[Row], what: str) -> str:
    good = {mode: {r.name for r in rows if r.mode == mode and _right(r)} for mode in MODES}
    names = {r.name for r in rows}
    refused = sorted({r.name for r in rows if not r.captured})
    wrong = sorted({r.name for r in rows if r.wrong})
    return (
        f"Of {len(names)} {what}, {len(good['eval'])} are optimized and equal their original in "
        f"eval mode and {len(good['train'])} in training mode. Refused in at least one mode: "
        f"{', '.join(refused) or 'none'}. "
        f"Different from the original: {', '.join(wrong) or 'none'}."
    )


MODES = ("eval", "train")


def _right(row: Row) -> bool:
    return row.captured and not row.wrong


def _table(rows: Iterable[Row]) -> str:
    head = "| model | family | mode | axes | nodes | rewrites | outputs | gradients | refusal |"
    lines = [head, "|" + " --- |" * (head.count("|") - 1)]
    return "\n".join([*lines, *map(_line, rows)])


def _line(row: Row) -> str:
    if not row.captured:
        cells = [row.name, row.family, row.mode, "", "", "", "", "", _plain(row.cause)]
        return f"| {' | '.join(cells)} |"
    applied = ", ".join(f"{n} {SHORT.get(name, name)}" for name, n in row.applied.items())
    gradient = "" if row.gradient is None else f"{row.gradient:.0e}"
    forward = f"{row.forward:.0e}" + (f" **differs at {row.wrong}**" if row.wrong else "")
    axes, nodes = ", ".join(row.axes), f"{row.before} → {row.after}"
    cells = [row.name, row.family, row.mode, axes, nodes, applied, forward, gradient]
    return f"| {' | '.join([*cells, _plain(row.cause)])} |"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _modules(rows: Sequence[Row]) -> str:
    wrong = [f"`{r.name}`" for r in rows if r.wrong]
    refused = [r for r in rows if not r.captured]
    kept = sum(bool(r.applied) for r in rows)
    names = {r.name.partition("[")[0] for r in rows}
    lines = [
        f"{len(rows)} samples of {len(names)} modules; {len(rows) - len(refused)} are optimized, "
        f"{kept} of them with rewrites. Different from the original: {', '.join(wrong) or 'none'}.",
        "",
        "| refused | why |",
        "| --- | --- |",
        *(f"| `{r.name}` | {_plain(r.cause)} |" for r in refused),
    ]
    return "\n".join(lines)
