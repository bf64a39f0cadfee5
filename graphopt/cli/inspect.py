"""``graphopt inspect FILE``: what a file holds, read without executing anything."""

from __future__ import annotations

import sys

import click

from graphopt.cli.console import print_json
from graphopt.cli.options import json_option


@click.command("inspect")
@click.argument("file", type=click.Path(exists=True))
@json_option
def command(file: str, as_json: bool) -> None:
    """Show what FILE holds. Nothing in it is run, and no code it names is imported.

    Exit status 1 where FILE is damaged, or would be refused for what it holds.
    """
    from graphopt.loading import inspect_file
    from graphopt.loading.findings import refuse

    facts = inspect_file(file)
    if as_json:  # the findings are part of the one document
        print_json(facts.to_dict())
        sys.exit(1 if facts.findings else 0)
    for line in facts.lines():
        click.echo(line)
    refuse(facts.findings)
