"""The report in the terminal; plain lines where the output is not one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from graphopt.report.explain import explain_lines
from graphopt.report.model import Report
from graphopt.report.summary import Row, Section, sections
from graphopt.report.text import printable

_COLOURS = (
    (r"NOT VERIFIED|\d+ rolled back", "bold red"),
    (r"(?<!not )\bverified\b(?!:)", "bold green"),
    (r"[1-9]\d* slower", "yellow"),
    (r"kept [1-9]\d*", "green"),
    (r"(?<=allowed by: ).*", "cyan"),
    (r"(?<=source line: ).*", "dim"),
)


def print_report(report: Report, console: Console | None = None, verbose: bool = False) -> None:
    """Show ``report``; ``verbose`` adds every single rewrite and miss, and the environment.

    Output that is not a terminal gets plain lines: no colours, no boxes, nothing wrapped.
    """
    console = console or Console()
    parts = sections(report, verbose=verbose)
    if not console.is_terminal or console.is_dumb_terminal:
        for line in plain_lines(parts):
            console.out(line, highlight=False)
        return
    for index, part in enumerate(parts):
        _show(console, part, header=index == 0)


def plain_lines(parts: Sequence[Section]) -> Iterator[str]:
    """The sections as lines of text; columns are aligned with spaces."""
    for index, part in enumerate(parts):
        if index:
            yield ""
        yield printable(part.title)
        yield from (f"  {printable(line)}" for line in part.lines)
        if part.rows:
            yield from (f"  {line}" for line in _aligned([part.columns, *part.rows]))


def _aligned(rows: Sequence[Row]) -> Iterator[str]:
    clean = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(r[i]) for r in clean if i < len(r)) for i in range(max(map(len, clean)))]
    for row in clean:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        yield "  ".join(cells).rstrip()


def _show(console: Console, part: Section, *, header: bool) -> None:
    title = Text(printable(part.title), style="bold")
    if not header:
        console.print()
    console.print(_coloured(title))
    for line in part.lines:
        indent = len(line) - len(line.lstrip())
        text = _coloured(Text(printable(line.strip())))
        console.print(Padding(text, (0, 0, 0, 2 + indent)))
    if part.rows:
        console.print(_table(part))


def _table(part: Section) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False)
    for column in part.columns:
        table.add_column(column, overflow="fold")
    for row in part.rows:
        table.add_row(*(_coloured(Text(printable(cell))) for cell in row))
    return table


def _coloured(text: Text) -> Text:
    for pattern, style in _COLOURS:
        text.highlight_regex(pattern, style)
    return text


__all__ = ["explain_lines", "plain_lines", "print_report"]
