"""``graphopt export MODEL``: an ONNX file, or a Hugging Face folder with quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from graphopt.cli.calibration import calibration_of
from graphopt.cli.console import print_json, progress
from graphopt.cli.options import json_option, model_options, recipe_options
from graphopt.cli.outputs import check_outputs, stem_of
from graphopt.cli.subject import Subject, load_subject, options_from
from graphopt.emit.module import OptimizedModule
from graphopt.errors import GraphoptError

FOLDERS = ("compressed-tensors", "gptq")


@click.command("export")
@model_options
@recipe_options
@json_option
@click.option("-o", "--output", type=click.Path(), help="Default: NAME.onnx, or NAME-FORMAT.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["onnx", *FOLDERS]),
    default="onnx",
    show_default=True,
    help="ONNX, or a Hugging Face folder whose quantized layers other programs serve.",
)
@click.option("--opset", type=int, help="ONNX operator set; the exporter's own by default.")
@click.option("--fuse/--no-fuse", default=True, help="ONNX Runtime's operator fusions.")
@click.option("--verify/--no-verify", default=True, help="Compare before the file is put in place.")
def command(
    model: str,
    inputs: str | None,
    arch: str | None,
    trust_pickle: bool,
    train: bool,
    dequantize: bool,
    recipe: str | None,
    passes: tuple[str, ...],
    strict: bool,
    measure: bool,
    calibration: str | None,
    as_json: bool,
    output: str | None,
    form: str,
    opset: int | None,
    fuse: bool,
    verify: bool,
) -> None:
    """Write MODEL as ONNX or as a Hugging Face folder, compared before it is put in place."""
    from graphopt.emit.onnx import check_program, check_target, export_onnx
    from graphopt.optimize import optimize_program

    with progress("export", quiet=as_json) as step:
        path = Path(output or f"{stem_of(model)}{'.onnx' if form == 'onnx' else f'-{form}'}")
        if form == "onnx":
            check_target(path, training=train, verify=verify)
        else:
            _check_folder(path, opset, train)
        check_outputs([path], [model, inputs, recipe, calibration])
        options = options_from(recipe, passes, strict, measure)
        subject = load_subject(model, inputs, arch, trust_pickle, train, dequantize)
        options = replace(options, calibration=calibration_of(calibration, subject))
        write = _folder_writer(subject, path, form, verify) if form != "onnx" else None
        step("capture")
        program, eager = subject.capture()
        if write is None:
            check_program(program)
        module = optimize_program(program, replace(options, progress=step), eager=eager)
        if write is None:
            step("translate and compare in ONNX Runtime")
            result = export_onnx(
                module, path, opset=opset, fuse=fuse, verify=verify, measure=measure
            )
            facts, lines = result.to_dict(), result.lines()
        else:
            step("write the folder and read it back")
            facts, lines = write(module)
    if as_json:
        print_json(facts)
        return
    for line in lines:
        click.echo(line)


def _check_folder(path: Path, opset: int | None, train: bool) -> None:
    """Refuse at once what would be refused after capture and optimization."""
    if opset is not None:
        raise GraphoptError(
            "a Hugging Face folder has no operator set", where="--opset", fix="leave it out"
        )
    if train:
        raise GraphoptError(
            "a model that trains has no quantized weights", where="--train", fix="leave it out"
        )
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise GraphoptError(
            "there are files already where the folder is to be written",
            where=f"--output {path}",
            fix="name a new folder",
        )


def _folder_writer(
    subject: Subject, path: Path, form: str, verify: bool
) -> Callable[[OptimizedModule], tuple[dict[str, object], list[str]]]:
    """What writes the folder; only a Hugging Face model has one."""
    from graphopt.emit.checkpoint import export_huggingface

    source = subject.module
    if subject.loaded.kind != "huggingface" or source is None:
        raise GraphoptError(
            f"a {subject.loaded.kind} file has no Hugging Face config to write {form} with",
            where=str(subject.loaded.source),
            fix="give a Hugging Face folder, or a .gguf file",
        )

    def write(module: OptimizedModule) -> tuple[dict[str, object], list[str]]:
        result = export_huggingface(module, path, source, format=form, verify=verify)
        return result.to_dict(), result.lines()

    return write
