"""Packing itself: how full packs are, how much they share, and how fast they are made.

packs    every set at one budget, with each prompt stored once and with every common beginning stored once. Reduction is
         tokens of one full sequence per response over tokens in the packs; its bound is that of the set without
         packing: prompt once per group, or one trie per group (sharing between groups can go beyond it). Where whole
         groups leave packs emptier than asked for, a second row lets groups be split.
layout   one pack of 32,768 tokens: its forest, its layout tensors, its block lists
stream   a generator of synthetic groups: speed and memory, with --stream

Process CPU time of one thread, the best of a few runs; tokenizing is not part of it. Tokens a second are tokens as they
are handed over, each prompt once.
"""

from __future__ import annotations

import gc
import resource
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
from ppcompile.runtime.packing.oversize import size_of

from .tokenized import Entry, data_sets, synthetic, tokenized

LEAST_FILL, LEAST_SPEED = 0.97, 2e6
LEAST_OF_BOUND = {"prompt": 0.99, "tree": 0.97}
LAYOUT_TOKENS, MOST_LAYOUT, MOST_LISTS = 32768, 3e-3, 2e-3
"""What is asked for; figures that miss it are red, and ``--check`` makes them an error."""


@dataclass(frozen=True)
class Packed:
    """One way to pack a set."""

    packs: int
    fill: float
    reduction: float
    of_bound: float
    speed: float

    def enough(self, share: str) -> bool:
        """Fill and reduction as asked for; a set of one pack has no fill to speak of."""
        full = self.packs == 1 or self.fill >= LEAST_FILL
        return full and (np.isnan(self.of_bound) or self.of_bound >= LEAST_OF_BOUND[share])


def main(
    data: Annotated[list[str] | None, typer.Option(help="sets of ../shared/data, or 'synthetic'; default: all")] = None,
    max_tokens: Annotated[int, typer.Option(help="budget of a pack")] = 16384,
    repeats: Annotated[int, typer.Option(help="runs, of which the best counts")] = 3,
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


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    table.add_column("set", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="left" if column in ("share", "groups") else "right")
    return table


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    """Least process time of a few runs."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.process_time()
        run()
        best = min(best, time.process_time() - begin)
    return best


# --------------------------------------------------------------------------- packs


def packs_table(sets: dict[str, list[Entry]], max_tokens: int, repeats: int, missed: list[str]) -> Table:
    """Fill, reduction and speed of every set."""
    table = _table(
        f"packs of {max_tokens:,} tokens (fill: all but the emptiest pack)",
        *("share", "groups", "packs", "fill", "reduction", "of bound", "M tok/s"),
    )
    for name, groups in sets.items():
        records = [as_record(group, f"group {n}") for n, group in enumerate(groups)]
        for share in ("prompt", "tree"):
            ways = {"whole": _packed(groups, records, share, max_tokens, repeats, split=False)}
            if not ways["whole"].enough(share):
                ways["split"] = _packed(groups, records, share, max_tokens, repeats, split=True)
            for way, found in ways.items():
                table.add_row(name, share, way, *_cells(found, share))
            best = list(ways.values())[-1]
            if not best.enough(share):
                missed.append(f"{name}, share={share}: fill {best.fill:.1%}, {best.of_bound:.1%} of its bound")
            if best.speed < LEAST_SPEED:
                missed.append(f"{name}, share={share}: {best.speed / 1e6:.2f} million tokens a second")
    return table


def _cells(found: Packed, share: str) -> list[str]:
    def cell(text: str, good: bool) -> str:
        return text if good else f"[red]{text}[/]"

    bound = "" if np.isnan(found.of_bound) else cell(f"{found.of_bound:.1%}", found.of_bound >= LEAST_OF_BOUND[share])
    fill = "" if found.packs == 1 else cell(f"{found.fill:.1%}", found.fill >= LEAST_FILL)
    speed = cell(f"{found.speed / 1e6:.1f}", found.speed >= LEAST_SPEED)
    return [f"{found.packs:,}", fill, f"{found.reduction:.2f}x", bound, speed]


def _packed(
    groups: list[Entry], records: list[Record], share: str, max_tokens: int, repeats: int, *, split: bool
) -> Packed:
    def run() -> None:
        nonlocal made, fills
        made = ppcompile.packs(
            groups, max_tokens=max_tokens, share=share, split_groups=split, oversize="split", epoch=0
        )
        fills = sorted(batch.num_tokens / max_tokens for batch in made)

    made: Any = None
    fills: list[float] = []
    seconds = _seconds(run, repeats)
    report = made.report
    bound = report.unpacked_tokens / sum(size_of(record, share) for record in records)
    if share == "prompt" and any(record.masks is not None for record in records):
        bound = float("nan")  # no prompt is given
    return Packed(
        packs=report.packs,
        fill=float(np.mean(fills[1:])) if len(fills) > 1 else float("nan"),
        reduction=report.reduction,
        of_bound=report.reduction / bound,
        speed=sum(record.num_tokens for record in records) / seconds,
    )


# --------------------------------------------------------------------------- one layout


def layout_table(sets: dict[str, list[Entry]], repeats: int, missed: list[str]) -> Table:
    """Milliseconds for one large pack of every set that fills one."""
    table = _table(
        f"one pack of {LAYOUT_TOKENS:,} tokens, milliseconds",
        *("share", "tokens", "sequences", "segments", "forest", "layout", "lists"),
    )
    for name, groups in sets.items():
        for share in ("prompt", "tree"):
            plan = next(ppcompile.plan_packs(groups, max_tokens=LAYOUT_TOKENS, share=share, oversize="split"))
            if plan.work.tokens < LAYOUT_TOKENS * 0.9:
                continue
            records = [item.record for item in plan.items]
            batch = plan.batch(pad_to_multiple_of=128)
            forest = _seconds(lambda plan=records, share=share: forest_of(plan, share), 10 * repeats)
            both = _seconds(lambda plan=plan: plan.batch(pad_to_multiple_of=128), 10 * repeats)
            lists = _seconds(lambda b=batch: block_lists(b.position_ids, b.subtree_end, 0), 10 * repeats)
            figures = [f"{seconds * 1e3:.2f}" for seconds in (forest, both - forest, lists)]
            sizes = (plan.work.tokens, batch.num_responses, len(batch.segments))
            table.add_row(name, share, *(f"{size:,}" for size in sizes), *figures)
            if both - forest > MOST_LAYOUT or lists > MOST_LISTS:
                missed.append(f"{name}, share={share}: layout {figures[1]} ms, block lists {figures[2]} ms")
    return table


# --------------------------------------------------------------------------- a stream


def stream_table(count: int, max_tokens: int, share: str, missed: list[str]) -> Table:
    """Speed and memory of a stream of ``count`` groups."""
    begin = time.process_time()
    tokens = sum(group.num_tokens for group in _generated(count))
    generating = time.process_time() - begin
    before = _peak_mib()
    table = Table("packs", "peak memory (MiB)", title=f"a stream of {count:,} groups, {tokens:,} tokens, share={share}")
    table.add_row("before", f"{before:,.0f}")
    begin = time.process_time()
    made = ppcompile.packs(_generated(count), max_tokens=max_tokens, share=share)
    shown = 10
    for number, _ in enumerate(made, start=1):
        if number == shown:
            table.add_row(f"{number:,}", f"{_peak_mib():,.0f}")
            shown *= 10
    speed = tokens / (time.process_time() - begin - generating)
    table.add_row(f"{made.report.packs:,} (all)", f"{_peak_mib():,.0f}")
    table.caption = f"{speed / 1e6:.2f} million tokens/s, {made.report.fill:.2%} filled; generating is not counted"
    if speed < LEAST_SPEED:
        missed.append(f"stream, share={share}: {speed / 1e6:.2f} million tokens a second")
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
