"""Packing itself: how full packs are, how much they share, and how fast they are made.

packs    every set at one budget, with each prompt stored once and with every common beginning stored once. Reduction is
         tokens of one full sequence per response over tokens in the packs; its bound is what ../shared/data/README.md
         counts for the whole set: prompt once, or one trie a record (sharing between records can go beyond it). Where
         whole groups leave packs emptier than asked for, a second row lets groups be split.
layout   one pack of 32,768 tokens: its forest, its layout tensors, its block lists
stream   a generator of synthetic groups: speed and memory, with --stream

Process CPU time of one thread: the median of a few runs, the least and the most, after one that does not count.
Tokenizing is not part of it; the time of packs is that of choosing and of writing all their tensors. Tokens a second
are tokens as they are handed over, each prompt once. What is asked for stands under each table; figures that miss it
are red.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import ppcompile
from ppcompile.runtime.batch import forest_of
from ppcompile.runtime.groups import Record, as_record
from ppcompile.runtime.layout import block_lists

from .tokenized import Entry, data_sets, published, synthetic, tokenized

LEAST_FILL, LEAST_SPEED = 0.97, 2e6
LEAST_OF_BOUND = {"prompt": 0.99, "tree": 0.97}
LEAST_REDUCTION = {("gsm8k_4", "tree"): 9.0}
LAYOUT_TOKENS, MOST_LAYOUT, MOST_LISTS = 32768, 3e-3, 2e-3
SETTLED, MOST_GROWTH = 100, 64.0
"""What is asked for; a stream's memory may grow by this many MiB from this pack on. ``--check`` makes misses errors."""

_PACKS_ASKED = (
    f"asked for: fill {LEAST_FILL:.0%}; of the bound {LEAST_OF_BOUND['prompt']:.0%} (prompt) and "
    f"{LEAST_OF_BOUND['tree']:.0%} (tree); {LEAST_SPEED / 1e6:.0f} million tokens a second; "
    + ", ".join(f"{name} {share} {least:.0f}x" for (name, share), least in LEAST_REDUCTION.items())
)
_LAYOUT_ASKED = f"asked for: layout {MOST_LAYOUT * 1e3:.0f} ms, lists {MOST_LISTS * 1e3:.0f} ms"


@dataclass(frozen=True)
class Packed:
    """One way to pack a set."""

    packs: int
    fill: float
    reduction: float
    bound: float
    speeds: list[float]

    @property
    def of_bound(self) -> float:
        """Reduction over what the whole set has; nan where that is not known."""
        return self.reduction / self.bound

    @property
    def speed(self) -> float:
        """Tokens a second, the median."""
        return statistics.median(self.speeds)

    def enough(self, name: str, share: str) -> bool:
        """Fill and reduction as asked for; a set of one pack has no fill to speak of."""
        full = self.packs == 1 or self.fill >= LEAST_FILL
        shared = np.isnan(self.bound) or self.of_bound >= LEAST_OF_BOUND[share]
        return full and shared and self.reduction >= LEAST_REDUCTION.get((name, share), 1.0)


def main(
    data: Annotated[list[str] | None, typer.Option(help="sets of ../shared/data, or 'synthetic'; default: all")] = None,
    max_tokens: Annotated[int, typer.Option(help="budget of a pack")] = 16384,
    repeats: Annotated[int, typer.Option(min=1, help="runs of everything")] = 3,
    stream: Annotated[int, typer.Option(help="stream this many synthetic groups, and nothing else")] = 0,
    share: Annotated[str, typer.Option(help="of the stream: prompt or tree")] = "prompt",
    check: Annotated[bool, typer.Option(help="exit with 1 where a figure is not what is asked for")] = False,
) -> None:
    """Entry point."""
    torch.set_num_threads(1)
    console = Console()
    missed: list[str] = []
    if stream:
        console.print(stream_table(stream, max_tokens, share, missed))
    else:
        sets = {name: _groups(name) for name in data or [*data_sets(), "synthetic"]}
        gc.freeze()  # the data of this benchmark is none of the collector's business
        console.print(packs_table(sets, max_tokens, repeats, missed))
        console.print(layout_table(sets, repeats, missed))
    for line in missed:
        console.print(f"[red]missed[/]: {line}")
    if check and missed:
        raise typer.Exit(1)


def _groups(name: str) -> list[Entry]:
    if name == "synthetic":
        return synthetic(2000)
    if name not in data_sets():
        raise typer.BadParameter(f"{name!r} is not there; take one of {', '.join([*data_sets(), 'synthetic'])}")
    return tokenized(name)


def _table(title: str, asked: str, *columns: str) -> Table:
    table = Table(title=title, caption=asked)
    table.add_column("set", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="left" if column in ("share", "groups") else "right")
    return table


def _seconds(run: Callable[[], Any]) -> float:
    """Process time of one run."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def _spread(values: list[float], digits: int) -> str:
    """``1.21 (1.20-1.34)``: the median, the least and the most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


# --------------------------------------------------------------------------- packs


def packs_table(sets: dict[str, list[Entry]], max_tokens: int, repeats: int, missed: list[str]) -> Table:
    """Fill, reduction and speed of every set."""
    bounds = published()
    table = _table(
        f"packs of {max_tokens:,} tokens (fill: all but the emptiest pack)",
        _PACKS_ASKED,
        *("share", "groups", "packs", "fill", "reduction", "bound", "of bound", "M tok/s"),
    )
    for name, groups in sets.items():
        records = [as_record(group, f"group {n}") for n, group in enumerate(groups)]
        for share in ("prompt", "tree"):
            bound = bounds.get(name, {}).get(share, float("nan"))
            ways = {"whole": _packed(groups, records, share, max_tokens, repeats, bound, split=False)}
            if not ways["whole"].enough(name, share):
                ways["split"] = _packed(groups, records, share, max_tokens, repeats, bound, split=True)
            for way, found in ways.items():
                table.add_row(name, share, way, *_cells(found, name, share))
            best = list(ways.values())[-1]
            if not best.enough(name, share):
                missed.append(
                    f"{name}, share={share}: fill {best.fill:.1%}, {best.reduction:.2f}x, {best.of_bound:.1%} of bound"
                )
            if best.speed < LEAST_SPEED:
                missed.append(f"{name}, share={share}: {best.speed / 1e6:.2f} million tokens a second")
    return table


def _cells(found: Packed, name: str, share: str) -> list[str]:
    def cell(text: str, good: bool) -> str:
        return text if good else f"[red]{text}[/]"

    known = not np.isnan(found.bound)
    return [
        f"{found.packs:,}",
        "" if found.packs == 1 else cell(f"{found.fill:.1%}", found.fill >= LEAST_FILL),
        cell(f"{found.reduction:.2f}x", found.reduction >= LEAST_REDUCTION.get((name, share), 1.0)),
        f"{found.bound:.2f}x" if known else "",
        cell(f"{found.of_bound:.1%}", found.of_bound >= LEAST_OF_BOUND[share]) if known else "",
        cell(_spread([speed / 1e6 for speed in found.speeds], 1), found.speed >= LEAST_SPEED),
    ]


def _packed(
    groups: list[Entry],
    records: list[Record],
    share: str,
    max_tokens: int,
    repeats: int,
    bound: float,
    *,
    split: bool,
) -> Packed:
    def run() -> None:
        nonlocal made, fills
        made = ppcompile.packs(
            groups, max_tokens=max_tokens, share=share, split_groups=split, oversize="split", epoch=0
        )
        fills = sorted(batch.num_tokens / max_tokens for batch in made)

    made: Any = None
    fills: list[float] = []
    run()
    seconds = [_seconds(run) for _ in range(repeats)]
    tokens = sum(record.num_tokens for record in records)
    return Packed(
        packs=made.report.packs,
        fill=float(np.mean(fills[1:])) if len(fills) > 1 else float("nan"),
        reduction=made.report.reduction,
        bound=bound,
        speeds=[tokens / taken for taken in seconds],
    )


# --------------------------------------------------------------------------- one layout


def layout_table(sets: dict[str, list[Entry]], repeats: int, missed: list[str]) -> Table:
    """Milliseconds for one large pack of every set that fills one."""
    table = _table(
        f"one pack of {LAYOUT_TOKENS:,} tokens, milliseconds",
        _LAYOUT_ASKED,
        *("share", "tokens", "sequences", "segments", "forest", "and layout", "layout", "lists"),
    )
    for name, groups in sets.items():
        for share in ("prompt", "tree"):
            plan = next(ppcompile.plan_packs(groups, max_tokens=LAYOUT_TOKENS, share=share, oversize="split"))
            if plan.work.tokens < LAYOUT_TOKENS * 0.9:
                continue
            records = [item.record for item in plan.items]
            batch = plan.batch(pad_to_multiple_of=128)
            times = [_layout_times(plan, batch, records, share) for _ in range(1 + 10 * repeats)]
            forest, both, lists = ([1e3 * seconds for seconds in column] for column in zip(*times[1:], strict=True))
            layout = statistics.median(both) - statistics.median(forest)
            figures = [_spread(forest, 2), _spread(both, 2), f"{layout:.2f}", _spread(lists, 2)]
            sizes = (plan.work.tokens, batch.num_responses, len(batch.segments))
            table.add_row(name, share, *(f"{size:,}" for size in sizes), *figures)
            if layout > 1e3 * MOST_LAYOUT or statistics.median(lists) > 1e3 * MOST_LISTS:
                missed.append(f"{name}, share={share}: layout {figures[2]} ms, block lists {figures[3]} ms")
    return table


def _layout_times(
    plan: ppcompile.PackPlan, batch: ppcompile.PackedBatch, records: list[Record], share: str
) -> tuple[float, float, float]:
    """Seconds of the forest, of the forest and the tensors written from it, and of the block lists."""
    forest = _seconds(lambda: forest_of(records, share))
    both = _seconds(lambda: plan.batch(pad_to_multiple_of=128))
    lists = _seconds(lambda: block_lists(batch.position_ids, batch.subtree_end, 0))
    return forest, both, lists


# --------------------------------------------------------------------------- a stream


def stream_table(count: int, max_tokens: int, share: str, missed: list[str]) -> Table:
    """Speed and memory of a stream of ``count`` groups."""
    begin = time.process_time()
    tokens = sum(group.num_tokens for group in _generated(count))
    generating = time.process_time() - begin
    table = Table("packs", "peak memory (MiB)", title=f"a stream of {count:,} groups, {tokens:,} tokens, share={share}")
    table.add_row("before", f"{_peak_mib():,.0f}")
    begin, settled = time.process_time(), float("nan")
    made = ppcompile.packs(_generated(count), max_tokens=max_tokens, share=share)
    shown = 10
    for number, _ in enumerate(made, start=1):
        if number == shown:
            table.add_row(f"{number:,}", f"{_peak_mib():,.0f}")
            shown *= 10
        if number == SETTLED:
            settled = _peak_mib()
    speed = tokens / (time.process_time() - begin - generating)
    growth = _peak_mib() - settled
    table.add_row(f"{made.report.packs:,} (all)", f"{_peak_mib():,.0f}")
    table.caption = (
        f"{speed / 1e6:.2f} million tokens a second, generating them aside (asked for: {LEAST_SPEED / 1e6:.0f}); "
        f"{growth:.0f} MiB more from pack {SETTLED} on (allowed: {MOST_GROWTH:.0f}); {made.report.fill:.2%} filled"
    )
    if speed < LEAST_SPEED:
        missed.append(f"stream, share={share}: {speed / 1e6:.2f} million tokens a second")
    if growth > MOST_GROWTH:
        missed.append(f"stream, share={share}: memory grew by {growth:.0f} MiB from pack {SETTLED} on")
    return table


def _generated(count: int) -> Iterator[ppcompile.Group]:
    """Groups cut out of one bank of random tokens, so that making them costs little."""
    rng = np.random.default_rng(0)
    bank = rng.integers(0, 32000, 1 << 20)
    sizes = np.exp(rng.normal(np.log(96), 0.7, (4096, 3))).astype(int).clip(1, 2000).tolist()
    starts = rng.integers(0, len(bank) - 2000, (4096, 3)).tolist()
    for n in range(count):
        rows = [
            bank[(start + n) % (len(bank) - 2000) :][:size]
            for start, size in zip(starts[n % 4096], sizes[n % 4096], strict=True)
        ]
        yield ppcompile.Group(rows[0], rows[1:])


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
