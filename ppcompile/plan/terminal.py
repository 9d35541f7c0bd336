"""A study as tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
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

_TITLES: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "caption_justify": "left"}
BARS = " ▁▂▃▄▅▆▇█"


def show(study: Study, words: Sequence[str], code: str, console: Console) -> None:
    """Print everything."""
    for part in _parts(study, words, code):
        console.print(part)


def _parts(study: Study, words: Sequence[str], code: str) -> Iterator[RenderableType]:
    yield _table("records (measured)", [["", ""], *record_rows(study)], show_header=False)
    yield _lengths(study.distributions)
    yield _table("tokens of the whole set, by what is stored once (measured)", sharing_rows(study))
    yield _table("padding of the usual layout (measured)", padding_rows(study))
    yield _table("packs by budget (measured)", budget_rows(study), caption=BUDGET_NOTE)
    yield _table("an epoch of each layout (tokens measured, rest predicted)", layout_rows(study), caption=LAYOUT_NOTE)
    yield Panel(Group(*(Text(f"- {line}") for line in words)), title="advice", border_style="green")
    yield Text("recommended:", style="bold")
    yield Syntax(code, "python", background_color="default", word_wrap=True)
    yield Text("formulas: ppcompile/plan/cost.py and size.py, and in the report of --html", style="dim")


def _table(title: str, rows: list[list[str]], **options: Any) -> Table:
    """A table whose first row is its header, numbers to the right."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, **{**_TITLES, **options})
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
    table = _table("lengths and shares (measured)", rows)
    table.columns[-1].justify = "left"
    table.columns[-1].no_wrap = True
    return table


def _bars(counts: Sequence[int]) -> str:
    """A histogram in one line; a bin with anything in it is not blank."""
    most = max(counts)
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)
