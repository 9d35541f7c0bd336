"""A study as one HTML file: tables, plots and formulas, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import inspect
from collections.abc import Iterator, Sequence
from html import escape
from types import ModuleType

from ppcompile.plan import cost, size
from ppcompile.plan import study as choice
from ppcompile.plan.figures import Plot, as_svg, plots
from ppcompile.plan.study import Study
from ppcompile.plan.wording import (
    BUDGET_NOTE,
    LAYOUT_NOTE,
    budget_rows,
    gigabytes,
    layout_rows,
    length_rows,
    operations,
    padding_rows,
    record_rows,
    sharing_rows,
    size_line,
)

__all__ = ["page"]

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #2b3036; background: #fff; max-width: 980px; margin: 2em auto;
       padding: 0 1.2em }
h1 { font-size: 1.5em; margin-bottom: 0.1em } h2 { font-size: 1.15em; margin: 2em 0 0.4em }
.note { color: #6a717a; font-size: 0.88em } .tiles { display: flex; flex-wrap: wrap; gap: 0.8em; margin: 1.2em 0 }
.tile { border: 1px solid #dfe3e8; border-radius: 6px; padding: 0.6em 1em; min-width: 9em }
.tile b { display: block; font-size: 1.45em; color: #3d5a80 }
table { border-collapse: collapse; margin: 0.4em 0 } td, th { padding: 0.2em 0.8em; text-align: right }
td:first-child, th:first-child { text-align: left; padding-left: 0 } th { border-bottom: 1px solid #9aa3ad }
tr:nth-child(even) td { background: #f6f7f9 } table.text td { text-align: left }
.wide { overflow-x: auto; font-variant-numeric: tabular-nums }
pre { background: #f6f7f9; border-radius: 6px; padding: 0.8em 1em; overflow-x: auto; font-size: 0.86em }
img { max-width: 100%; height: auto } figure { margin: 0.4em 0 }
"""


def page(study: Study, words: Sequence[str], code: str, source: str) -> str:
    """The whole document.

    Args:
        study: the numbers.
        words, code: from :mod:`ppcompile.plan.advice`.
        source: the name of the data set.
    """
    body = "\n".join(_body(study, words, code, source))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>packing {escape(source)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _body(study: Study, words: Sequence[str], code: str, source: str) -> Iterator[str]:
    yield f"<h1>What packing will gain on {escape(source)}</h1>"
    yield f'<p class="note">Predicted for {escape(size_line(study))}</p>'
    yield _tiles(study)
    yield "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in words) + "</ul>"
    yield f"<h2>Recommended settings</h2><pre>{escape(code)}</pre>"
    drawn = {plot.title: plot for plot in plots(study)}
    yield from _section(drawn, "Tokens computed in an epoch")
    yield from _section(drawn, "Cost of an epoch and memory of a step", layout_rows(study))
    yield f'<p class="note">{escape(LAYOUT_NOTE)}</p>'
    yield from _section(drawn, "Packs by budget", budget_rows(study))
    yield f'<p class="note">{escape(BUDGET_NOTE)}</p>'
    yield from _section(drawn, "Padding of the usual layout", padding_rows(study))
    yield from _section(drawn, "Lengths", length_rows(study.distributions))
    yield from _section(drawn, "Shared beginnings", sharing_rows(study))
    yield "<h2>Records</h2>" + _table([["", ""], *record_rows(study)], "text")
    yield "<h2>What is measured, what is predicted, and how</h2>"
    yield (
        "<p>Records, lengths, shared beginnings, padding and packs are counted on the data. Operations and memory are "
        "predicted: no step was run.</p>"
    )
    for module in (size, cost, choice):
        text = inspect.cleandoc(module.__doc__ or "").replace("``", "").replace("::\n", ":\n")
        yield f"<pre>{escape(text + _constants(module))}</pre>"


def _constants(module: ModuleType) -> str:
    """The numbers that a module's text calls by name."""
    found = {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, (int, float))}
    return "\n\n" + ", ".join(f"{name} = {value:,}" for name, value in found.items()) if found else ""


def _tiles(study: Study) -> str:
    first = study.usual_costs[0]
    tiles = [
        (f"{study.chosen.reduction:.2f}x", "fewer tokens than unpacked"),
        (f"{first.slots / study.recommended.slots:.2f}x", f"fewer than {first.name}"),
        (f"{study.cheaper(first):.2f}x", f"fewer operations than {first.name}, predicted"),
        (f"{study.chosen.max_tokens:,}", f"tokens a pack, {study.chosen.steps:,} packs an epoch"),
        (operations(study.recommended.flops), "an epoch, predicted"),
        (gigabytes(study.recommended.bytes), "the largest step, predicted"),
    ]
    cells = (f'<div class="tile"><b>{escape(number)}</b>{escape(text)}</div>' for number, text in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _section(drawn: dict[str, Plot], title: str, rows: list[list[str]] | None = None) -> Iterator[str]:
    plot = drawn[title]
    picture = base64.b64encode(as_svg(plot.figure)).decode()
    yield f'<h2>{escape(title)}</h2><p class="note">{escape(plot.caption)}</p>'
    alt = escape(f"{title}, {plot.caption}")
    yield f'<figure><img alt="{alt}" src="data:image/svg+xml;base64,{picture}"></figure>'
    if rows is not None:
        yield _table(rows)


def _table(rows: list[list[str]], kind: str = "numbers") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]]
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>{"".join(lines)}</table></div>'
