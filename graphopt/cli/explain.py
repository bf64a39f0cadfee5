"""``graphopt explain MODEL``: the report, with nothing written."""

from __future__ import annotations

from dataclasses import replace

import click

from graphopt.cli.calibration import calibration_of
from graphopt.cli.console import print_json, progress
from graphopt.cli.options import json_option, model_options, recipe_options
from graphopt.cli.subject import load_subject, options_from


@click.command("explain")
@model_options
@recipe_options
@json_option
@click.option("--node", metavar="NAME", help="Only what concerns this node.")
@click.option("--graph", is_flag=True, help="Print the captured program as Python first.")
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
    node: str | None,
    graph: bool,
) -> None:
    """Say what would be rewritten in MODEL, what would not, and why."""
    from graphopt.recipe import rewrite_program
    from graphopt.report.explain import explain_lines

    with progress("explain", quiet=as_json) as step:
        options = options_from(recipe, passes, strict, measure)
        subject = load_subject(model, inputs, arch, trust_pickle, train, dequantize)
        options = replace(options, calibration=calibration_of(calibration, subject))
        step("capture")
        program, eager = subject.capture()
        _, report = rewrite_program(program, replace(options, progress=step), eager)
    if as_json:
        print_json(report.to_dict())
        return
    if graph:
        click.echo(str(program))
    for line in explain_lines(report, node=node):
        click.echo(line)
