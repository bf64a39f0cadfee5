"""``graphopt passes``: every pass, its options and its rules."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import click

from graphopt.cli.console import print_json
from graphopt.cli.options import json_option
from graphopt.rewrite.passes import Pass, make_pass, registered_passes


@click.command("passes")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the passes, or show one NAME with its rules and their mathematics.

    Those that rewrite ONNX files are listed behind those on captured models.
    """
    from graphopt.onnx_files.recipe import OWN

    files = [kind for own, kind in OWN.items() if name in (None, own)]
    if name is None:
        shown = list(registered_passes().values())
    elif files and name not in registered_passes():
        shown = []
    else:
        shown = [type(make_pass(name, where="graphopt passes"))]
    if as_json:
        facts = [{"name": k.__name__, "doc": _text(k), "on": "ONNX files"} for k in files]
        print_json([*map(_facts, shown), *facts])
        return
    for kind in shown:
        _print(kind, details=name is not None)
    for step in files:
        click.echo(f"{step.__name__} (on ONNX files): {_text(step)}")


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


def _text(kind: type[Any]) -> str:
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split())


def _first_line(kind: type[Pass]) -> str:
    return inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
