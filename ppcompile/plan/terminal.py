"""A study as tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ppcompile.plan.lengths import Distribution
from ppcompile.plan.study import Study
from ppcompile.plan.wording import (
    BUDGET_NOTE,
    LAYOUT_NOTE,
    budget_rows,
    layout_rows,
    length_rows,
    padding_rows,
    record_rows,
    sharing_rows,
)

__all__ = ["show"]

BARS = " ▁▂▃▄▅▆▇█"


def show(study: Study, words: Sequence[str], code: str, console: Console) -> None:
    """Print everything."""
    for part in _parts(study, words, code):
        console.print(part)


def _parts(study: Study, words: Sequence[str], code: str) -> Iterator[RenderableType]:
    yield from _titled("records (measured)", _table([["", ""], *record_rows(study)], show_header=False))
    yield from _titled("lengths and shares (measured)", _lengths(study.distributions))
    yield from _titled("tokens of the whole set, by what is stored once (measured)", _table(sharing_rows(study)))
    yield from _titled("padding of the usual layout (measured)", _table(padding_rows(study)))
    yield from _titled("packs by budget (measured)", _table(budget_rows(study)), BUDGET_NOTE)
    yield from _titled(
        "an epoch of each layout (tokens measured, rest predicted)", _table(layout_rows(study)), LAYOUT_NOTE
    )
    yield _advice(words)
    yield Text("recommended:", style="bold")
    yield Syntax(code, "python", background_color="default", word_wrap=True)
    yield Text("formulas: ppcompile/plan/cost.py and size.py, and in the report of --html", style="dim")


def _titled(title: str, table: Table, note: str = "") -> Iterator[RenderableType]:
    """A table between a title and a note, which may be wider than the table."""
    yield Text(title, style="bold")
    yield table
    if note:
        yield Text(f"{note}\n", style="dim")


def _table(rows: list[list[str]], *, show_header: bool = True) -> Table:
    """A table whose first row is its header, numbers to the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=show_header)
    for n, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if n == 0 else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    return table


def _lengths(distributions: Sequence[Distribution]) -> Table:
    rows = length_rows(distributions)
    rows[0].append("from least to most")
    for row, distribution in zip(rows[1:], distributions, strict=True):
        row.append(_bars(distribution.counts))
    table = _table(rows)
    table.columns[-1].justify = "left"
    table.columns[-1].no_wrap = True
    return table


def _advice(words: Sequence[str]) -> Panel:
    lines = Table.grid(padding=(0, 1))
    for line in words:
        lines.add_row("-", Text(line))
    return Panel(lines, title="advice", border_style="green")


def _bars(counts: Sequence[int]) -> str:
    """A histogram in one line; a bin with anything in it is not blank."""
    most = max(counts)
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)
