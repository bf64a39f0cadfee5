"""``graphopt bench MODEL``: eager, torch.compile and graphopt, interleaved in one run."""

from __future__ import annotations

from dataclasses import replace

import click

from graphopt.cli.calibration import calibration_of
from graphopt.cli.console import print_json, progress
from graphopt.cli.onnx_file import bench_file, is_onnx
from graphopt.cli.options import json_option, model_options, recipe_options
from graphopt.cli.subject import load_subject, options_from
from graphopt.errors import GraphoptError


@click.command("bench")
@model_options
@recipe_options
@json_option
@click.option("--rounds", type=click.IntRange(3), default=11, show_default=True)
@click.option("--inductor/--no-inductor", default=True, help="Also graphopt followed by Inductor.")
@click.option("--onnx/--no-onnx", default=False, help="Also the exported ONNX file.")
@click.option("--ablation/--no-ablation", default=True, help="Also the recipe without each pass.")
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="Of an ONNX file: where its profile is written, .html or .json. May be repeated.",
)
@click.pass_context
def command(
    context: click.Context,
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
    rounds: int,
    inductor: bool,
    onnx: bool,
    ablation: bool,
    outputs: tuple[str, ...],
) -> None:
    """Time MODEL as it is, under torch.compile and under graphopt, and what each pass adds.

    An ONNX file is timed in ONNX Runtime, as it is and optimized, and profiled by operator.
    """
    from graphopt.benchmark import bench

    if is_onnx(model):
        bench_file(context)
        return
    if outputs:
        raise GraphoptError(
            "a profile is written of an ONNX file",
            where=f"--output {outputs[0]}",
            fix="leave it out; --json prints the times",
        )
    with progress("bench", quiet=as_json) as step:
        options = options_from(recipe, passes, strict, measure)
        subject = load_subject(model, inputs, arch, trust_pickle, train, dequantize)
        options = replace(options, calibration=calibration_of(calibration, subject))
        if subject.module is None:
            raise GraphoptError(
                "a .pt2 has no eager module to compare with",
                where=model,
                fix="give the model it was made from",
            )
        found = bench(
            subject.module,
            subject.inputs,
            options,
            rounds=rounds,
            inductor=inductor,
            onnx=onnx,
            ablation=ablation,
            step=step,
        )
    if as_json:
        print_json(found.to_dict())
        return
    for line in found.lines():
        click.echo(line)
