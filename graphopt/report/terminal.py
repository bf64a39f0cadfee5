"""The report in the terminal; plain lines where the output is not one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from graphopt.report.explain import explain_lines
from graphopt.report.model import Report
from graphopt.report.summary import Row, Section, sections
from graphopt.report.text import printable

_GAP = 3
"""Spaces between the columns of a table."""

_SHORT = 14
"""Cells up to this length stay on one line."""

_SELF_EVIDENT = frozenset({"", "outcome", "class", "worst certificate", "certificate", "error"})
"""Columns whose cells say by themselves what they are."""

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
        _show_rows(console, part)


def _show_rows(console: Console, part: Section) -> None:
    """A table, or one paragraph per row where columns would be narrower than their words."""
    widths = _widths([part.columns, *part.rows], console.width)
    if widths is not None:
        console.print(_table(part, widths))
        return
    for row in part.rows:
        console.print(Padding(Text(printable(row[0]), style="bold"), (0, 0, 0, 2)))
        for line in _packed(_named(part.columns[1:], row[1:]), console.width - 4):
            console.print(Padding(_coloured(Text(line)), (0, 0, 0, 4)))


def _named(columns: Row, row: Row) -> Iterator[str]:
    """Cells behind the names of their columns; empty ones are left out."""
    for name, cell in zip(columns, row, strict=False):
        if cell:
            yield printable(cell if name in _SELF_EVIDENT else f"{name} {cell}")


def _packed(parts: Iterable[str], room: int) -> Iterator[str]:
    """Lines of as many parts as fit, separated by semicolons."""
    line = ""
    for part in parts:
        if line and cell_len(line) + cell_len(part) + 3 > room:
            yield f"{line};"
            line = part
        else:
            line = f"{line}; {part}" if line else part
    if line:
        yield line


def _widths(rows: Sequence[Row], room: int) -> list[int] | None:
    """Widths of columns that fit in ``room`` and break no word; ``None`` where none do."""
    columns = [[printable(cell) for cell in cells] for cells in zip_longest(*rows, fillvalue="")]
    widths = [max(map(cell_len, cells)) for cells in columns]
    least = [max(map(_least, cells)) for cells in columns]
    for _ in range(sum(widths) + _GAP * (len(widths) - 1) - room):
        spare = [i for i, width in enumerate(widths) if width > least[i]]
        if not spare:
            return None
        widths[max(spare, key=widths.__getitem__)] -= 1
    return widths


def _least(cell: str) -> int:
    if len(cell) <= _SHORT:
        return cell_len(cell)
    return max(map(cell_len, cell.split()), default=0)


def _table(part: Section, widths: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", show_edge=False)
    for column, width in zip_longest(part.columns, widths, fillvalue=""):
        table.add_column(str(column), width=int(width), overflow="fold")
    for row in part.rows:
        table.add_row(*(_coloured(Text(printable(cell))) for cell in row))
    return table


def _coloured(text: Text) -> Text:
    for pattern, style in _COLOURS:
        text.highlight_regex(pattern, style)
    return text


__all__ = ["explain_lines", "plain_lines", "print_report"]
