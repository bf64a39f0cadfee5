"""Who makes ONNX files of a model, each with its own way to fuse them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import graphopt
from benchmarks.onnx_models import Flat, Subject
from graphopt.emit.onnx_translate import quiet

PATIENCE = 900.0
"""Seconds that optimum may take."""


class NotMade(Exception):  # noqa: N818
    """Why somebody has no file of a model."""


def plain(subject: Subject, folder: Path) -> Path:
    """``torch.onnx.export(dynamo=True)``, optimized as that does it."""
    path = folder / "plain.onnx"
    dims = {n: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for n, axes in subject.axes.items()}
    given: dict[str, Any] = {"kwargs": subject.call, "dynamic_shapes": dims}
    model = subject.model
    if subject.decodes:
        first, rest = list(dims.values())[:3], tuple(list(dims.values())[3:])
        model = Flat(model)
        given = {"args": tuple(subject.call.values()), "dynamic_shapes": (*first, rest)}
        given["input_names"] = list(subject.call)
    with quiet():
        made = torch.onnx.export(model, dynamo=True, verbose=False, **given)
        assert made is not None
        made.save(path, external_data=False)
    return path


def onnxscript_optimizer(_subject: Subject, folder: Path) -> Path:
    """On the plain file, as the next one."""
    import onnx_ir
    import onnxscript.optimizer

    path = folder / "onnxscript-optimizer.onnx"
    with quiet():
        read = onnx_ir.load(folder / "plain.onnx")
        onnx_ir.save(onnxscript.optimizer.optimize(read, num_iterations=5), path)
    return path


def onnxscript_fusions(_subject: Subject, folder: Path) -> Path:
    import onnx_ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    path = folder / "onnxscript-fusions.onnx"
    with quiet():
        made, _ = optimize_for_ort(onnx_ir.load(folder / "plain.onnx"))
        onnx_ir.save(made, path)
    return path


def ort_transformers(subject: Subject, folder: Path) -> Path:
    """Its optimizer on the plain file; ONNX Runtime's own rewrites where it has no model type."""
    from onnxruntime.transformers.optimizer import optimize_model

    path = folder / "onnxruntime-transformers.onnx"
    kind, heads, width = subject.kind or ("bert", 0, 0)
    with quiet():
        made = optimize_model(
            str(folder / "plain.onnx"),
            kind,
            heads,
            width,
            only_onnxruntime=subject.kind is None,
            opt_level=1 if subject.kind is None else None,
        )
        made.save_model_to_file(str(path))
    return path


def optimum(subject: Subject, folder: Path, level: str = "none") -> Path:
    """optimum's export, by ``OPTIMUM_PATH`` where that has optimum and what it needs.

    It is a process of its own, since optimum wants an older transformers.
    """
    if subject.task is None:
        raise NotMade("optimum exports models of transformers alone")
    given, made = folder / "transformers", folder / f"optimum-{level}"
    if not given.exists():
        subject.model.save_pretrained(given)  # type: ignore[operator]
    root = str(Path(__file__).parents[1])
    paths = [p for p in (os.environ.get("OPTIMUM_PATH"), root) if p]
    command = [sys.executable, "-m", "benchmarks.optimum_worker"]
    done = subprocess.run(
        [*command, str(given), subject.task, str(made), level],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode or not last.startswith("{"):
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise NotMade(said[:300])
    found = json.loads(last)
    if "error" in found:
        raise NotMade(found["error"])
    return Path(found["file"])


def own(subject: Subject, folder: Path) -> Path:
    if subject.decodes:
        graphopt.export_onnx_folder(subject.model, folder / "own")
        return folder / "own" / "model.onnx"
    path = folder / "own.onnx"
    fast = graphopt.compile(subject.model, example_kwargs=subject.call, dynamic_shapes=subject.axes)
    graphopt.export_onnx(fast, path)
    return path


def own_in_one_copy(subject: Subject, folder: Path) -> Path:
    """The file that keeps a tied embedding and head at one copy in memory."""
    if not subject.decodes:
        raise NotMade("it has no tied weights")
    graphopt.export_onnx_folder(subject.model, folder / "one-copy", one_copy=True)
    return folder / "one-copy" / "model.onnx"


def own_of_plain(subject: Subject, folder: Path) -> Path:
    path = folder / "own-of-plain.onnx"
    inputs = {name: tensor.numpy() for name, tensor in subject.call.items()}
    graphopt.optimize_onnx(folder / "plain.onnx", path, inputs=inputs)
    return path


OWN = ("graphopt", "graphopt, one copy", "graphopt optimize, of the dynamo export")
MAKERS: dict[str, Callable[[Subject, Path], Path]] = {
    "dynamo export": plain,
    "onnxscript optimizer": onnxscript_optimizer,
    "onnxscript fusions": onnxscript_fusions,
    "onnxruntime.transformers": ort_transformers,
    "optimum": optimum,
    "optimum, O2": lambda subject, folder: optimum(subject, folder, "O2"),
    OWN[0]: own,
    OWN[1]: own_in_one_copy,
    OWN[2]: own_of_plain,
}
"""All write float32, with dynamic axes; the second half of names reads files of the first."""
