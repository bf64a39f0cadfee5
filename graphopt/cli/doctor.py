"""``graphopt doctor``: versions, devices, and what is wrong with this installation."""

from __future__ import annotations

import sys

import click

from graphopt.cli.console import print_json
from graphopt.cli.options import json_option


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Check this installation; exit status 1 if something needs to be changed."""
    from graphopt.health import examine

    found = examine()
    if as_json:
        print_json(found.to_dict())
    else:
        for line in found.lines():
            click.echo(line)
    sys.exit(1 if found.problems else 0)
