"""A study as plots: matplotlib figures that belong to no window."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from ppcompile.plan.lengths import Distribution
from ppcompile.plan.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Plot", "as_svg", "plots"]

BLUE, ORANGE, GREEN, GREY, RED = "#3d5a80", "#e07a3f", "#2a9d8f", "#c9ced6", "#d1495b"
INK = "#3a4048"
WIDTH = 9.2
"""Inches; all plots stand under one another."""

FEWEST_PLACES = 6  # bars of a histogram that there is room for
OF_SEQUENCES = ("response", "sequence")
"""Distributions that count sequences; the others count records."""

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa3ad",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "path",  # looks the same where fonts differ
    "svg.hashsalt": "ppcompile",  # same study, same bytes
}


@dataclass(frozen=True)
class Plot:
    """A figure and what it shows, for those who do not see it too."""

    title: str
    caption: str
    figure: Figure


def plots(study: Study) -> Iterator[Plot]:
    """All plots, in the order in which they are read."""
    with matplotlib.rc_context(STYLE):
        yield Plot("Tokens computed in an epoch", "by layout: unique, stored again, padding; measured", _tokens(study))
        yield Plot("Cost of an epoch and memory of a step", "by layout; predicted", _costs(study))
        yield Plot("Packs by budget", "tokens saved and packs of an epoch; measured", _budgets(study))
        yield Plot("Padding of the usual layout", "by batch size; measured", _padding(study))
        yield Plot("Lengths", "histograms of tokens, by the lower edge of each bin; measured", _lengths(study))
        yield Plot(
            "Shared beginnings",
            "histograms over records, in tokens unless the title says otherwise; measured",
            _shares(study),
        )


def as_svg(figure: Figure) -> bytes:
    """The figure as a picture that refers to nothing outside itself."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    return buffer.getvalue()


# --------------------------------------------------------------------------- layouts


def _tokens(study: Study) -> Figure:
    figure, (axes,) = _row(1, height=0.9 + 0.3 * len(study.layouts))
    unique = study.recommended.slots
    parts = [
        ("unique", BLUE, [unique for layout in study.layouts]),
        ("stored again", ORANGE, [layout.slots - layout.padding - unique for layout in study.layouts]),
        ("padding", GREY, [layout.padding for layout in study.layouts]),
    ]
    left = [0] * len(study.layouts)
    for label, color, sizes in parts:
        sizes = [max(0, size) for size in sizes]  # with records cut at a budget the recommended packs may store more
        axes.barh(_names(study), sizes, left=left, color=color, label=label, height=0.7)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for n, layout in enumerate(study.layouts):
        axes.text(left[n], n, f"  {layout.slots / unique:.2f}x", va="center")
    axes.set(xlim=(0, max(left) * 1.1), xlabel="tokens; beside the bars: tokens over those of the recommended packs")
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.legend(loc="lower right")
    axes.invert_yaxis()
    return figure


def _costs(study: Study) -> Figure:
    figure, (cost, memory) = _row(2, height=0.9 + 0.3 * len(study.layouts), sharey=True)
    names = _names(study)
    colors = [GREEN if layout is study.recommended else BLUE for layout in study.layouts]
    flops = [layout.flops / 1e15 for layout in study.layouts]
    gigabytes = [layout.bytes / 1e9 for layout in study.layouts]
    cost.barh(names, flops, color=colors, height=0.7)
    for n, layout in enumerate(study.layouts):
        cost.text(flops[n], n, f"  {study.cheaper(layout):.2f}x", va="center")
    cost.set(xlim=(0, max(flops) * 1.17), xlabel="10¹⁵ operations an epoch")
    memory.barh(names, gigabytes, color=colors, height=0.7)
    limit = study.machine.memory / 1e9
    memory.axvline(limit, color=RED, lw=1.2, label=f"memory of a device, {limit:,.0f} GB")
    memory.set(xlim=(0, max(*gigabytes, limit) * 1.06), xlabel="GB, largest step")
    memory.legend(loc="upper center", bbox_to_anchor=(0.5, 1.13))
    cost.invert_yaxis()
    return figure


def _names(study: Study) -> list[str]:
    return [layout.name + (" (recommended)" if layout is study.recommended else "") for layout in study.layouts]


# --------------------------------------------------------------------------- budgets and padding


def _budgets(study: Study) -> Figure:
    figure, (saved, number) = _row(2, height=3.0)
    budgets = [entry.max_tokens for entry in study.budgets[::2]]
    for offset, share, color in ((0, "prompt", BLUE), (1, "tree", GREEN)):
        entries = study.budgets[offset::2]
        saved.plot(budgets, [entry.reduction for entry in entries], "o-", ms=4, color=color, label=f'share="{share}"')
        number.plot(budgets, [entry.steps for entry in entries], "o-", ms=4, color=color, label=f'share="{share}"')
    bound = study.sharing.reduction("set_trie")
    saved.axhline(bound, color=GREEN, lw=0.8, ls="--", label="whole set in one pack")
    saved.set(title="times fewer tokens than unpacked", ylim=(1 - 0.05 * (bound - 1), None))
    number.set(title="packs of an epoch", ylim=(0, 1.1 * max(entry.steps for entry in study.budgets)))
    for axes in (saved, number):
        axes.axvline(study.chosen.max_tokens, color=ORANGE, lw=1, ls=":", label="recommended")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="max_tokens")
        axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets], rotation=30, ha="right")
        axes.minorticks_off()
    number.yaxis.set_major_formatter(FuncFormatter(_short))
    saved.legend(fontsize=8)
    return figure


def _padding(study: Study) -> Figure:
    figure, (axes,) = _row(1, height=2.4)
    sizes = [layout.batch_size for layout in study.usual[::2]]
    for offset, label, color in ((0, "as the data come", ORANGE), (1, "sorted by length", BLUE)):
        places = [n + (offset - 0.5) * 0.38 for n in range(len(sizes))]
        waste = [layout.waste for layout in study.usual[offset::2]]
        axes.bar(places, waste, width=0.36, color=color, label=label)
        for place, share in zip(places, waste, strict=True):
            axes.text(place, share, f"{share:.0%}", ha="center", va="bottom")
    axes.set_xticks(range(len(sizes)), [f"{size} records a batch" for size in sizes])
    axes.set(ylabel="padding, share of slots", ylim=(0, max(0.1, 1.15 * max(layout.waste for layout in study.usual))))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --------------------------------------------------------------------------- distributions


def _lengths(study: Study) -> Figure:
    figure, all_axes = _row(4, height=4.6, columns=2)
    for axes, distribution in zip(all_axes, study.distributions[:4], strict=True):
        _histogram(axes, distribution)
    return figure


def _shares(study: Study) -> Figure:
    figure, all_axes = _row(3, height=2.5)
    for axes, distribution in zip(all_axes, study.distributions[4:], strict=True):
        _histogram(axes, distribution)
    return figure


def _histogram(axes: Axes, distribution: Distribution) -> None:
    """Bars of equal width, whatever the bins; the edges below, or the one value of a bin, say what they are."""
    edges, counts = distribution.edges, distribution.counts
    axes.bar(range(len(counts)), counts, width=0.92, align="edge", color=BLUE)
    is_share = edges[-1] <= 1
    single = all(b - a == 1 for a, b in itertools.pairwise(edges)) and not is_share  # a bin is one value
    shown = range(0, len(edges) - single, -(-len(edges) // 7))
    labels = [f"{edges[n]:.0%}" if is_share else _short(edges[n]) for n in shown]
    axes.set_xticks([n + 0.46 * single for n in shown], labels)
    room = max(0, FEWEST_PLACES - len(counts)) / 2  # so that a bar looks like a bar where there are few
    axes.set_xlim(-0.3 - room, len(counts) + 0.3 + room)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))
    axes.set_ylabel("sequences" if distribution.title in OF_SEQUENCES else "records", fontsize=8)
    form = ".0%" if is_share else ",.0f"
    axes.set_title(distribution.title, pad=14)
    note = f"median {distribution.median:{form}}, 95% up to {distribution.p95:{form}}, most {distribution.most:{form}}"
    axes.text(0, 1.01, note, transform=axes.transAxes, fontsize=7.5, color="#6a717a", va="bottom")


# --------------------------------------------------------------------------- parts


def _row(count: int, height: float, columns: int | None = None, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    columns = columns or count
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(-(-count // columns), columns, sharey=sharey, squeeze=False)
    return figure, list(axes.flat)


def _short(value: float, place: int | None = None) -> str:
    """``1.5M``, ``20k``, ``1,431``; with the place on an axis that matplotlib gives, which does not matter."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size and value >= 1e4:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}"
