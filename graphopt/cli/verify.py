"""``graphopt verify A B``: do two models compute the same?"""

from __future__ import annotations

import sys

import click

from graphopt.cli.console import print_json, progress
from graphopt.cli.options import json_option


@click.command("verify")
@click.argument("a", type=click.Path(exists=True))
@click.argument("b", type=click.Path(exists=True))
@click.option("--inputs", metavar="SPEC|FILE", help="Inputs for both, as for optimize.")
@click.option("--arch", metavar="MODULE:FACTORY", help="What builds the module of a state dict.")
@click.option("--trust-pickle", is_flag=True, help="Let a pickled module run the code it holds.")
@click.option(
    "--tolerance",
    type=float,
    default=2e-5,
    show_default=True,
    help="Largest RMS difference, relative to the RMS of A's output.",
)
@json_option
def command(
    a: str,
    b: str,
    inputs: str | None,
    arch: str | None,
    trust_pickle: bool,
    tolerance: float,
    as_json: bool,
) -> None:
    """Compare models A and B (each a module, .pt2 or .onnx) on the same inputs.

    Exit status 0 if every output agrees, 1 if one does not.
    """
    from graphopt.side_by_side import compare_files

    with progress("verify", quiet=as_json) as step:
        found = compare_files(
            a, b, inputs, arch=arch, trust_pickle=trust_pickle, tolerance=tolerance, step=step
        )
    if as_json:
        print_json(found.to_dict())
    else:
        for line in found.lines():
            click.echo(line)
    sys.exit(0 if found.equal else 1)
