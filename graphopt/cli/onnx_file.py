"""``graphopt optimize`` and ``bench`` on ONNX files, which are rewritten and run as they are."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from graphopt.cli.calibration import batches
from graphopt.cli.console import print_json, progress
from graphopt.cli.options import DEFAULT_RECIPE
from graphopt.cli.outputs import check_outputs, check_place, stem_of
from graphopt.errors import GraphoptError, RecipeError
from graphopt.files import atomic_path
from graphopt.inputs import from_file, given_inputs
from graphopt.loading.findings import Limits
from graphopt.loading.sniff import sniff

WRITABLE = (".onnx", ".html", ".json", ".yaml")


def is_onnx(model: str) -> bool:
    """Whether MODEL is an ONNX file, by its content.

    Raises:
        LoadError: the file is of no kind that graphopt reads.
    """
    return sniff(Path(model), Limits.from_env()) == "onnx"


def refuse_options(model: str, verb: str, **given: Any) -> None:
    """Refuse options that mean nothing for an ONNX file, and were given.

    Raises:
        GraphoptError: names the option.
    """
    for name, value in given.items():
        if value:
            option = f"--{name.replace('_', '-')}"
            raise GraphoptError(
                f"{option} means nothing to `graphopt {verb}` for an ONNX file: {_WHY[name]}",
                where=f"{option} with {model}",
                fix="leave it out",
            )


_WHY = {
    "arch": "the file is a whole model",
    "trust_pickle": "it holds no pickle",
    "train": "it is rewritten for inference, as it is",
    "dequantize": "quantized weights stay as they are stored",
    "target inductor": "ONNX Runtime runs it",
    "inductor": "nothing is compiled by Inductor",
    "onnx": "it is one, and timed in ONNX Runtime anyway",
    "ablation": "only the whole recipe is timed beside the original",
}


def recipe_of(recipe: str | None, passes: tuple[str, ...]) -> str | list[str]:
    """``--recipe`` or ``--pass``, not both.

    Raises:
        RecipeError: both are given.
    """
    if passes and recipe is not None:
        raise RecipeError(
            f"--pass runs instead of a recipe, and --recipe {recipe} was given too",
            where="--pass",
            fix="leave one of them out; a YAML recipe can hold the passes of both",
        )
    return list(passes) if passes else recipe or DEFAULT_RECIPE


def inputs_of(inputs: str | None) -> dict[str, Any] | None:
    """``--inputs`` as tensors by name."""
    return None if inputs is None else given_inputs(inputs).kwargs


def calibration_of(
    path: str | None, model: str, given: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """``--calibration`` as batches as large as the inputs that are given, or one as it is.

    Raises:
        GraphoptError: the file cannot be read, or is a text.
    """
    if path is None:
        return []
    if Path(path).suffix.lower() == ".txt":
        raise GraphoptError(
            f"a text says nothing about the inputs of {Path(model).name}",
            where=f"--calibration {path}",
            fix="give a .pt, .safetensors or .npz file with one named tensor per input",
        )
    found = from_file(path).kwargs
    return list(batches(found, given)) if given else [found]


def optimize_file(
    model: str,
    outputs: tuple[str, ...],
    *,
    inputs: str | None,
    recipe: str | None,
    passes: tuple[str, ...],
    calibration: str | None,
    strict: bool,
    measure: bool,
    as_json: bool,
) -> None:
    """Rewrite an ONNX file, verify the result, write it and report."""
    from graphopt.onnx_files.optimize import optimize_onnx

    targets = _targets(outputs, model)
    check_outputs(targets, [model, inputs, recipe, calibration])
    written = [path for path in targets if path.suffix == ".onnx"]
    with progress("optimize", quiet=as_json) as step, ExitStack() as stack:
        given = inputs_of(inputs)
        # reports fail before the model is put in place, and the model before reports are
        places = [(p, stack.enter_context(atomic_path(p))) for p in targets if p.suffix != ".onnx"]
        found = optimize_onnx(
            model,
            written[0],
            passes=recipe_of(recipe, passes),
            inputs=given,
            calibration=calibration_of(calibration, model, given),
            strict=strict,
            measure=measure,
            progress=step,
        )
        for target, place in places:
            step(f"write {target.name}")
            _write_report(found.report, place)
    if as_json:
        print_json({"written": [str(p) for p in targets], **found.to_dict()})
        return
    found.report.print()
    for path in (*targets, *found.external):
        click.echo(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _targets(outputs: tuple[str, ...], model: str) -> list[Path]:
    default = [] if any(Path(o).suffix == ".onnx" for o in outputs) else [_default(model)]
    paths = [*default, *(Path(o) for o in outputs)]
    for path in paths:
        check_place(path, WRITABLE)
    if sum(path.suffix == ".onnx" for path in paths) > 1:
        raise GraphoptError(
            "one ONNX file is written from an ONNX file",
            where="--output",
            fix="name one file that ends in .onnx",
        )
    return paths


def _default(model: str) -> Path:
    return Path(f"{stem_of(model)}.optimized.onnx")


def _write_report(report: Any, path: Path) -> None:
    import yaml

    if path.suffix == ".html":
        report.to_html(path)
    elif path.suffix == ".json":
        report.to_json(path)
    else:
        path.write_text(yaml.safe_dump({"passes": report.recipe}, sort_keys=False))


PROFILES = (".html", ".json")


def bench_file(context: click.Context) -> None:
    """Time and profile an ONNX file; options are those of `graphopt bench`, as they were given.

    Raises:
        GraphoptError: an option that was given means nothing for an ONNX file.
    """
    from graphopt.onnx_files.bench import bench_onnx

    given = context.params
    model, as_json = given["model"], given["as_json"]
    for name in ("arch", "trust_pickle", "train", "dequantize", "inductor", "onnx", "ablation"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            refuse_options(model, "bench", **{name: True})
    targets = [Path(output) for output in given["outputs"]]
    check_outputs(targets, [model, given["inputs"], given["recipe"], given["calibration"]])
    for path in targets:
        check_place(path, PROFILES)
    with progress("bench", quiet=as_json) as step, ExitStack() as stack:
        places = [stack.enter_context(atomic_path(path)) for path in targets]
        inputs = inputs_of(given["inputs"])
        found = bench_onnx(
            model,
            passes=recipe_of(given["recipe"], given["passes"]),
            inputs=inputs,
            calibration=calibration_of(given["calibration"], model, inputs),
            strict=given["strict"],
            measure=given["measure"],
            rounds=given["rounds"],
            step=step,
        )
        for place in places:
            _write_profile(found, place)
    if as_json:
        print_json(found.to_dict())
        return
    for line in (*found.lines(), *(f"wrote {path}" for path in targets)):
        click.echo(line)


def _write_profile(found: Any, path: Path) -> None:
    from graphopt.onnx_files.profile_page import render_profile

    if path.suffix == ".html":
        path.write_text(render_profile(found), encoding="utf-8")
    else:
        path.write_text(json.dumps(found.to_dict(), indent=2), encoding="utf-8")
