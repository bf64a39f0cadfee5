"""``graphopt inspect FILE``: what a file holds, read without executing anything."""

from __future__ import annotations

import click

from graphopt.cli.console import print_json
from graphopt.cli.options import json_option


@click.command("inspect")
@click.argument("file", type=click.Path(exists=True))
@json_option
def command(file: str, as_json: bool) -> None:
    """Show what FILE holds. Nothing in it is run, and no code it names is imported."""
    from graphopt.loading import inspect_file

    facts = inspect_file(file)
    if as_json:
        print_json(facts.to_dict())
        return
    for line in facts.lines():
        click.echo(line)
