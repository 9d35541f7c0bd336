"""Packs for many ranks: the same number for each, of like cost, and the totals of every step.

A *row* is one pack for each rank, run at the same time; a *step* is what one optimizer step holds, ``packs_per_step``
rows.
Packs of like cost share a row, so that no rank waits long for another, and within a row the rank that has done
least gets most.

Ranks never differ in the number of packs: where the last packs do not make a whole row, the dearest of them are divided
in two until they do. No group is left out, and none comes twice; where packs of one group each leave nothing to divide,
that is an error, unless ``drop_last`` allows to leave the cheapest of them out. The last step may hold fewer rows than
the others; its totals say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..batch import StepTotals
from .cost import CostModel
from .fill import Pack, pack_of
from .pool import Item
from .report import PackingReport

__all__ = ["Dealer", "Step"]


@dataclass(frozen=True)
class Step:
    """One optimizer step: ``rows[n][rank]`` is a rank's ``n``-th pack of it."""

    rows: list[list[Pack]]
    totals: StepTotals


class Dealer:
    """Deals a stream of packs to ranks.

    Args:
        world_size: ranks.
        packs_per_step: rows of a step.
        at_once: how many packs are sorted by cost and dealt together; more where a step needs more.
        cost: what is balanced.
        share: ``"prompt"`` or ``"tree"``.
        sort: rows in order of falling cost.
        split_groups: a pack that holds one group only may be divided too.
        drop_last: leave out packs that do not make a row and cannot be divided, instead of an error.
        rng: shuffles the rows; ``None`` for the order in which packs were made.
        report: counts packs that are divided, and what is left out.
    """

    def __init__(
        self,
        *,
        world_size: int,
        packs_per_step: int,
        at_once: int,
        cost: CostModel,
        share: str,
        sort: bool,
        split_groups: bool,
        drop_last: bool,
        rng: np.random.Generator | None,
        report: PackingReport,
    ) -> None:
        self.world_size, self.packs_per_step = world_size, packs_per_step
        self.at_once = max(at_once, (packs_per_step + 1) * world_size)  # a step, and a row that is held back
        self.cost, self.share, self.sort, self.split_groups = cost, share, sort, split_groups
        self.drop_last, self.rng, self.report = drop_last, rng, report
        self._done = np.zeros(world_size)  # cost of what each rank got so far
        self._steps = 0

    def steps(self, packs: Iterable[Pack]) -> Iterator[Step]:
        """The packs in steps; holds back enough of them to make the last row whole.

        Raises:
            ValueError: fewer groups than ranks, in all.
        """
        held: list[Pack] = []
        for pack in packs:
            held.append(pack)
            if len(held) >= self.at_once:
                ready, held = self._ready(held)
                yield from self._deal(ready)
        if held:
            yield from self._deal(self._whole_rows(held))

    def _ready(self, held: list[Pack]) -> tuple[list[Pack], list[Pack]]:
        """Packs of whole steps, and what is held back for the end: a row at least, that can be divided furthest."""
        by_groups = sorted(range(len(held)), key=lambda n: -len(held[n].items))
        kept = set(by_groups[: self.world_size] if self.world_size > 1 else ())
        whole = self.world_size * self.packs_per_step
        ready = [n for n in range(len(held)) if n not in kept]
        ready = ready[: len(ready) // whole * whole]
        dealt = set(ready)
        return [held[n] for n in ready], [pack for n, pack in enumerate(held) if n not in dealt]

    def _whole_rows(self, packs: list[Pack]) -> list[Pack]:
        """The packs, the dearest of them divided until their number is a multiple of the ranks.

        Raises:
            ValueError: none can be divided, and none may be left out, or none would be left.
        """
        packs = list(packs)
        while len(packs) % self.world_size:
            divisible = [n for n, pack in enumerate(packs) if len(_pieces(pack, self.split_groups)) > 1]
            if not divisible:
                return self._without_the_rest(packs)
            dearest = max(divisible, key=lambda n: self.cost.predict(packs[n].work))
            packs[dearest : dearest + 1] = self._halves(packs[dearest])
            self.report.divided_packs += 1
        return packs

    def _without_the_rest(self, packs: list[Pack]) -> list[Pack]:
        """Whole rows of packs, the cheapest packs left out and counted."""
        rest = len(packs) % self.world_size
        nothing_left = not self._steps and rest == len(packs)
        if not self.drop_last or nothing_left:
            ways = "fewer ranks, more data, " + "drop_last=True to leave some of them out, " * (not nothing_left)
            raise ValueError(
                f"the last {len(packs)} packs hold one group each and cannot feed {self.world_size} ranks evenly. "
                f"Nothing was dropped or repeated. Try: {ways}or split_groups=True if your loss does not need all "
                "responses of a group in one pack"
            )
        by_cost = sorted(packs, key=lambda pack: self.cost.predict(pack.work))
        for item in (item for pack in by_cost[:rest] for item in pack.items):
            self.report.add_dropped(item.record.num_sequences, f"{item.name} (drop_last)")
        return by_cost[rest:]

    def _halves(self, pack: Pack) -> list[Pack]:
        halves: tuple[list[Item], list[Item]] = ([], [])
        sizes = [0, 0]
        for item in sorted(_pieces(pack, self.split_groups), key=lambda item: -item.record.num_tokens):
            side = int(sizes[1] < sizes[0])
            halves[side].append(item)
            sizes[side] += item.record.num_tokens
        return [pack_of(half, self.share) for half in halves]

    def _deal(self, packs: list[Pack]) -> Iterator[Step]:
        """Whole rows of packs, in steps."""
        costs = np.array([self.cost.predict(pack.work) for pack in packs])
        by_cost = np.argsort(-costs, kind="stable") if self.world_size > 1 or self.sort else np.arange(len(packs))
        rows = list(by_cost.reshape(-1, self.world_size))
        if self.rng is not None and not self.sort:
            self.rng.shuffle(rows)
        for first in range(0, len(rows), self.packs_per_step):
            step = [self._row(row, costs) for row in rows[first : first + self.packs_per_step]]
            dealt = [[packs[n] for n in row] for row in step]
            yield Step(dealt, self._totals([pack for row in dealt for pack in row]))
            self._steps += 1

    def _row(self, row: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """Packs of a row in the order of the ranks that take them; ``row`` falls in cost."""
        ranks = np.argsort(self._done, kind="stable")
        self._done[ranks] += costs[row]
        dealt = np.empty_like(row)
        dealt[ranks] = row
        return dealt

    def _totals(self, packs: list[Pack]) -> StepTotals:
        items = [item for pack in packs for item in pack.items]
        return StepTotals(
            index=self._steps,
            packs=len(packs),
            responses=sum(item.record.num_sequences for item in items),
            scored_tokens=sum(item.record.num_scored for item in items),
            weight=sum(item.weight for item in items),
        )


def _pieces(pack: Pack, split_groups: bool) -> list[Item]:
    """What a pack can be divided into."""
    if len(pack.items) > 1 or not split_groups:
        return pack.items
    return [item.part([n]) for item in pack.items for n in range(item.record.num_sequences)]
