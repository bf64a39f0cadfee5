"""The command group, and how errors look to a person or to a program."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

import click

from graphopt.errors import GraphoptError

VERBS = {
    "optimize": "rewrite a model, verify it, write it",
    "explain": "what would be rewritten, what not, and why",
    "export": "write a verified ONNX file or quantized checkpoint",
    "verify": "compare two models numerically",
    "bench": "eager, torch.compile and graphopt in one run",
    "inspect": "show what a file holds, without running it",
    "passes": "passes, their options and rules",
    "doctor": "check this installation",
}


class LazyGroup(click.Group):
    """Loads a verb's module when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        found: click.Command = import_module(f"graphopt.cli.{cmd_name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="graphopt")
def cli() -> None:
    """Capture a PyTorch model, rewrite its graph, prove each rewrite, lower it, explain it."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: expected errors become one message and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        cli.main(arguments, prog_name="graphopt", standalone_mode=False)
    except GraphoptError as error:
        _show_error(error, as_json="--json" in arguments)
        sys.exit(1)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        if "--json" in arguments:
            _show_error(_as_ours(error), as_json=True)
        else:
            error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing was written", err=True)
        sys.exit(130)


def _as_ours(error: click.ClickException) -> GraphoptError:
    """An error in the call itself, with the place and the advice that click prints around it."""
    context = getattr(error, "ctx", None)
    called = context.command_path if context else "graphopt"
    return GraphoptError(error.format_message(), where=called, fix=f"see `{called} --help`")


def _show_error(error: GraphoptError, *, as_json: bool) -> None:
    facts: dict[str, Any] = {"what": error.what, "where": error.where, "fix": error.fix}
    if as_json:
        click.echo(json.dumps({"error": facts}))
        return
    click.echo(f"error: {error.what}", err=True)
    if error.where:
        click.echo(f"  at: {error.where}", err=True)
    if error.fix:
        click.echo(f"  try: {error.fix}", err=True)
