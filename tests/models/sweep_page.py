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


def page(rows: Sequence[Row]) -> str:
    hugging_face = [r for r in rows if r.family not in ("cnn", "module")]
    modules = [r for r in rows if r.family == "module"]
    return PAGE.format(
        forward=FORWARD_TOLERANCE,
        gradient=GRADIENT_TOLERANCE,
        date=datetime.datetime.now(datetime.UTC).date(),
        versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
        machine=f"{platform.machine()} CPU, Python {platform.python_version()}",
        summary=_summary(hugging_face, "Hugging Face architectures"),
        hugging_face=_table(hugging_face),
        cnn=_table([r for r in rows if r.family == "cnn"]),
        modules=_modules(modules),
    )


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
