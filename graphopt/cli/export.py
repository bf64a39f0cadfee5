"""``graphopt export MODEL``: an ONNX file, a folder around one, or one with quantized weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from torch import nn

from graphopt.cli.calibration import calibration_of
from graphopt.cli.console import print_json, progress
from graphopt.cli.options import json_option, model_options, recipe_options
from graphopt.cli.outputs import check_outputs, stem_of
from graphopt.cli.subject import Subject, load_subject, options_from
from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    from graphopt.emit.checkpoint import Checkpoint
    from graphopt.emit.onnx import OnnxResult
    from graphopt.emit.onnx_folder import FolderPlan
    from graphopt.recipe import Options

FOLDERS = ("compressed-tensors", "gptq")
OPTIMUM = "optimum"


@click.command("export")
@model_options
@recipe_options
@json_option
@click.option("-o", "--output", type=click.Path(), help="Default: NAME.onnx, or NAME-FORMAT.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["onnx", OPTIMUM, *FOLDERS]),
    default="onnx",
    show_default=True,
    help="An ONNX file; optimum: a folder around one, or several, that optimum, "
    "sentence-transformers, onnxruntime-genai and graphopt.generation load, of a language model "
    "with its cache; or a Hugging Face folder whose quantized layers other programs serve.",
)
@click.option("--opset", type=int, help="ONNX operator set; the exporter's own by default.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "mixed"]),
    help="Half precision for a float32 model; mixed is float16 that takes and gives float32. "
    "Operators that need float32 keep it.",
)
@click.option("--fuse/--no-fuse", default=True, help="ONNX Runtime's operator fusions.")
@click.option(
    "--one-copy",
    is_flag=True,
    help="Sessions hold a weight that embedding and head share once; few rows are slower.",
)
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
    dtype: str | None,
    fuse: bool,
    one_copy: bool,
    verify: bool,
) -> None:
    """Write MODEL as ONNX or as a Hugging Face folder, compared before it is put in place."""
    from graphopt.emit.onnx_folder import write_folder

    with progress("export", quiet=as_json) as step:
        path = Path(output or f"{stem_of(model)}{'.onnx' if form == 'onnx' else f'-{form}'}")
        _check_target(path, form, opset, dtype, train, verify, inputs, one_copy)
        check_outputs([path], [model, inputs, recipe, calibration])
        options = options_from(recipe, passes, strict, measure)
        subject = load_subject(model, inputs, arch, trust_pickle, train, dequantize)
        plan = _plan(subject, calibration) if form == OPTIMUM else None
        if plan is not None:
            subject = replace(subject, module=plan.model, inputs=plan.inputs)
        calibrated = calibration_of(calibration, subject)
        options = replace(options, calibration=calibrated, progress=step)
        settings: dict[str, Any] = {
            "opset": opset,
            "fuse": fuse,
            "verify": verify,
            "dtype": dtype,
            "one_copy": one_copy,
        }
        if plan is not None:
            found: Any = write_folder(plan, path, options, **settings)
        elif form in FOLDERS:
            found = _huggingface_folder(subject, path, form, options, verify)
        else:
            found = _file(subject, path, options, settings)
        facts, lines = found.to_dict(), found.lines()
    if as_json:
        print_json(facts)
        return
    for line in lines:
        click.echo(line)


def _check_target(
    path: Path,
    form: str,
    opset: int | None,
    dtype: str | None,
    train: bool,
    verify: bool,
    inputs: str | None,
    one_copy: bool,
) -> None:
    """Refuse at once what would be refused after capture and optimization."""
    from graphopt.emit.onnx import check_opset, check_target

    if form not in FOLDERS:
        file = path if form == "onnx" else path / "model.onnx"
        check_target(file, training=train, verify=verify, dtype=dtype)
        check_opset(opset)
    if form == OPTIMUM and inputs is not None:
        raise GraphoptError(
            "the layout decides which inputs the file has", where="--inputs", fix="leave it out"
        )
    if form in FOLDERS and opset is not None:
        raise GraphoptError(
            "a Hugging Face folder has no operator set", where="--opset", fix="leave it out"
        )
    if form in FOLDERS and dtype is not None:
        raise GraphoptError(
            "a Hugging Face folder keeps the dtype of what is not quantized",
            where=f"--dtype {dtype}",
            fix="leave it out, or write --format onnx",
        )
    if form in FOLDERS and one_copy:
        raise GraphoptError(
            "a Hugging Face folder has no ONNX Runtime session",
            where="--one-copy",
            fix="leave it out",
        )
    if form in FOLDERS and train:
        raise GraphoptError(
            "a model that trains has no quantized weights", where="--train", fix="leave it out"
        )
    if form != "onnx" and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise GraphoptError(
            "there are files already where the folder is to be written",
            where=f"--output {path}",
            fix="name a new folder",
        )


def _plan(subject: Subject, calibration: str | None) -> FolderPlan:
    """How a Hugging Face model is called in its folder; no other model has one."""
    from graphopt.emit.onnx_folder import plan_folder, refuse_calibration
    from graphopt.huggingface_inputs import tokenizer_of

    module, source = _huggingface(subject, OPTIMUM)
    plan = plan_folder(module, source, tokenizer_of(subject.loaded))
    refuse_calibration(plan, calibration)
    return plan


def _huggingface(subject: Subject, form: str) -> tuple[nn.Module, Path]:
    source = subject.module
    if subject.loaded.kind != "huggingface" or source is None:
        raise GraphoptError(
            f"a {subject.loaded.kind} file has no Hugging Face config to write {form} with",
            where=str(subject.loaded.source),
            fix="give a Hugging Face folder, or a .gguf file",
        )
    return source, subject.loaded.source


def _file(subject: Subject, path: Path, options: Options, settings: dict[str, Any]) -> OnnxResult:
    from graphopt.emit.onnx import check_program, export_onnx
    from graphopt.emit.onnx_half_choice import check_dtype
    from graphopt.optimize import optimize_program

    options.progress("capture")
    program, eager = subject.capture()
    check_program(program)
    check_dtype(program, settings["dtype"])
    module = optimize_program(program, options, eager=eager)
    options.progress("translate and compare in ONNX Runtime")
    return export_onnx(module, path, measure=options.measure, **settings)


def _huggingface_folder(
    subject: Subject, path: Path, form: str, options: Options, verify: bool
) -> Checkpoint:
    """The model with quantized weights in safetensors; only a Hugging Face model has such."""
    from graphopt.emit.checkpoint import export_huggingface
    from graphopt.optimize import optimize_program

    source, _ = _huggingface(subject, form)
    options.progress("capture")
    program, eager = subject.capture()
    module = optimize_program(program, options, eager=eager)
    options.progress("write and read back")
    return export_huggingface(module, path, source, format=form, verify=verify)
