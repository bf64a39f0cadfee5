"""``graphopt passes``: every pass, its options and its rules."""

from __future__ import annotations

import dataclasses
import inspect

import click

from graphopt.cli.console import print_json
from graphopt.cli.options import json_option
from graphopt.rewrite.passes import Pass, make_pass, registered_passes


@click.command("passes")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the passes, or show one NAME with its rules and their mathematics."""
    if name is not None:
        shown = [type(make_pass(name, where="graphopt passes"))]
    else:
        shown = list(registered_passes().values())
    if as_json:
        print_json([_facts(kind) for kind in shown])
        return
    for kind in shown:
        _print(kind, details=name is not None)


def _facts(kind: type[Pass]) -> dict[str, object]:
    rules = [
        {"name": r.name, "numeric": r.numeric.value, "version": r.version, "doc": r.__doc__}
        for r in kind().rules()
    ]
    options = [
        {"name": f.name, "type": str(f.type), "default": f.default}
        for f in dataclasses.fields(kind)
    ]
    return {"name": kind.__name__, "doc": _first_line(kind), "options": options, "rules": rules}


def _print(kind: type[Pass], *, details: bool) -> None:
    click.echo(f"{kind.__name__}: {_first_line(kind)}")
    for field in dataclasses.fields(kind):
        click.echo(f"  {field.name}={field.default!r}  ({field.type})")
    if not details:
        return
    for rule in kind().rules():
        click.echo(f"\n  {rule.name} ({rule.numeric.value}, version {rule.version})")
        for line in inspect.cleandoc(rule.__doc__ or "").splitlines():
            click.echo(f"    {line}")


def _first_line(kind: type[Pass]) -> str:
    return inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
