"""``graphopt export MODEL -o model.onnx``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from graphopt.cli.calibration import calibration_of
from graphopt.cli.console import print_json, progress
from graphopt.cli.options import json_option, model_options, recipe_options
from graphopt.cli.outputs import check_outputs, stem_of
from graphopt.cli.subject import load_subject, options_from


@click.command("export")
@model_options
@recipe_options
@json_option
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Default: NAME.onnx.")
@click.option("--opset", type=int, help="ONNX operator set; the exporter's own by default.")
@click.option("--fuse/--no-fuse", default=True, help="ONNX Runtime's operator fusions.")
@click.option("--verify/--no-verify", default=True, help="Compare in ONNX Runtime before writing.")
def command(
    model: str,
    inputs: str | None,
    arch: str | None,
    trust_pickle: bool,
    train: bool,
    recipe: str | None,
    passes: tuple[str, ...],
    strict: bool,
    measure: bool,
    calibration: str | None,
    as_json: bool,
    output: str | None,
    opset: int | None,
    fuse: bool,
    verify: bool,
) -> None:
    """Write MODEL as ONNX, compared in ONNX Runtime before the file is put in place."""
    from graphopt.emit.onnx import check_program, check_target, export_onnx
    from graphopt.optimize import optimize_program

    with progress("export", quiet=as_json) as step:
        path = Path(output or f"{stem_of(model)}.onnx")
        check_target(path, training=train, verify=verify)
        check_outputs([path], [model, inputs, recipe, calibration])
        options = options_from(recipe, passes, strict, measure)
        subject = load_subject(model, inputs, arch, trust_pickle, train)
        options = replace(options, calibration=calibration_of(calibration, subject))
        step("capture")
        program, eager = subject.capture()
        check_program(program)
        module = optimize_program(program, replace(options, progress=step), eager=eager)
        step("translate and compare in ONNX Runtime")
        result = export_onnx(module, path, opset=opset, fuse=fuse, verify=verify, measure=measure)
    if as_json:
        print_json(result.to_dict())
        return
    for line in result.lines():
        click.echo(line)
