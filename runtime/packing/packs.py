"""``packs()``: any number of groups, from a list or a stream, into packs of one budget, for one rank or many.

    read  ->  check  ->  oversize policy  ->  fill packs from a window  ->  deal them to ranks  ->  tensors

Only a window of groups is in memory: ``window`` packs' worth that wait, and as many packs that are being dealt. All
choices follow from the data, ``seed`` and ``epoch``, so every rank makes the same plan and takes its own packs from it;
the tensors of other ranks' packs are never built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from ..batch import PackedBatch, StepTotals, check_int, check_share, pack_records
from ..groups import Entry, Group, Rollout
from .cost import CostModel
from .oversize import Budget, check_policies
from .pool import Item, Work
from .ranks import Dealer, Step
from .report import PackingReport
from .windows import fill_windows, is_indexable, read_items

__all__ = ["PackPlan", "PackPlans", "Packs", "packs", "plan_packs"]


@dataclass(frozen=True, eq=False)
class PackPlan:
    """One pack before its tensors exist; small, and safe to send to a worker process.

    Attributes:
        items: the groups (or parts of groups) that go in.
        share: ``"prompt"`` or ``"tree"``.
        work: tokens and attention pairs of the pack.
        step: totals of the step that it belongs to.
    """

    items: tuple[Item, ...]
    share: str
    work: Work
    step: StepTotals

    @property
    def group_index(self) -> list[int]:
        """Which of the inputs each group is."""
        return [item.index for item in self.items]

    @property
    def sequence_index(self) -> list[int]:
        """Which of its input's sequences each sequence is."""
        return [n for item in self.items for n in item.sequences]

    def batch(self, *, pad_to_multiple_of: int = 1, pad_token_id: int = 0) -> PackedBatch:
        """Write the pack."""
        return pack_records(
            [item.record for item in self.items],
            share=self.share,
            pad_to_multiple_of=pad_to_multiple_of,
            pad_token_id=pad_token_id,
            group_index=self.group_index,
            sequence_index=self.sequence_index,
            step=self.step,
        )


def packs(
    groups: Iterable[Entry],
    *,
    max_tokens: int = 16384,
    share: str = "prompt",
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    sort: bool = False,
    oversize: str | Sequence[str] = "error",
    split_groups: bool = False,
    drop_last: bool = False,
    window: int = 64,
    rank: int = 0,
    world_size: int = 1,
    packs_per_step: int = 1,
    cost: CostModel | None = None,
    weight: Callable[[Any], float] | None = None,
    pad_to_multiple_of: int = 1,
    pad_token_id: int = 0,
    skip: int = 0,
) -> Packs:
    """Pack any number of groups: an iterator of :class:`PackedBatch`.

    >>> groups = [Group([1] * 6, [[2] * 3, [3] * 4]) for _ in range(10)]
    >>> [batch.num_tokens for batch in packs(groups, max_tokens=40, shuffle=False)]
    [39, 39, 39, 13]

    Args:
        groups: what :func:`pack` takes, a list or any iterable. What has a length and can be indexed is shuffled as a
            whole; what cannot, within the window. Every rank must be given the same groups in the same order.
        max_tokens: budget of a pack in tokens, each stored token once, padding aside.
        share: as in :func:`pack`.
        seed, epoch: of everything that is drawn: same numbers, same packs. Other epochs pack other groups together.
        shuffle: draw the order of groups and packs.
        sort: hand out packs in order of falling cost, as far as the window reaches, instead of in random order.
        oversize: what happens to a group beyond the budget: ``"error"``, ``"keep_start"`` or ``"keep_end"`` (cut it),
            ``"split"`` (its sequences over several packs, the common beginning repeated), ``"drop"``; or several of
            these, tried in order. See :mod:`runtime.packing.oversize`.
        split_groups: sequences of *any* group may stand in different packs where that fills them. Leave it off for
            losses that compare the responses of a group.
        drop_last: packs at the end that hold one group each and do not suffice for all ranks are left out and counted;
            without it they are an error.
        window: how many packs' worth of groups are kept to choose from, and how many packs are dealt at once.
        rank, world_size: whose packs, of how many ranks. Every rank gets the same number of packs.
        packs_per_step: packs of one rank in one optimizer step (gradient accumulation).
        cost: what is balanced over ranks, and what ``sort`` sorts by.
        weight: what a group weighs in the loss, for ``batch.step.weight``: called with the group as it was given, such
            as ``lambda group: number_of_pairs(group)``. By default the number of its sequences. Parts of a group that
            is split weigh in proportion to their sequences.
        pad_to_multiple_of, pad_token_id: as in :func:`pack`.
        skip: leave out this many packs of this rank at the start, without building them: to resume.

    Returns:
        An iterator whose ``report`` counts what was packed, cut and dropped so far.

    Raises:
        TypeError, ValueError: an argument that is not accepted, at once; a group that is not, or that does not fit,
            when it is reached (its index is named).
    """
    check_int("pad_to_multiple_of", pad_to_multiple_of, least=1)
    check_int("pad_token_id", pad_token_id, least=0)
    plans = plan_packs(
        groups,
        max_tokens=max_tokens,
        share=share,
        seed=seed,
        epoch=epoch,
        shuffle=shuffle,
        sort=sort,
        oversize=oversize,
        split_groups=split_groups,
        drop_last=drop_last,
        window=window,
        rank=rank,
        world_size=world_size,
        packs_per_step=packs_per_step,
        cost=cost,
        weight=weight,
        skip=skip,
    )
    return Packs(plans, pad_to_multiple_of, pad_token_id)


class Packs(Iterator[PackedBatch]):
    """What :func:`packs` returns.

    Attributes:
        report: counts over all ranks, as far as packing has come.
    """

    def __init__(self, plans: PackPlans, pad_to_multiple_of: int, pad_token_id: int) -> None:
        self._plans, self._multiple, self._token = plans, pad_to_multiple_of, pad_token_id
        self.report = plans.report

    def __next__(self) -> PackedBatch:
        return next(self._plans).batch(pad_to_multiple_of=self._multiple, pad_token_id=self._token)


class PackPlans(Iterator[PackPlan]):
    """What :func:`plan_packs` returns.

    Attributes:
        report: counts over all ranks, as far as planning has come.
    """

    def __init__(self, plans: Iterator[PackPlan], report: PackingReport) -> None:
        self._plans = plans
        self.report = report

    def __next__(self) -> PackPlan:
        return next(self._plans)


def plan_packs(
    groups: Iterable[Entry | Item],
    *,
    max_tokens: int = 16384,
    share: str = "prompt",
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    sort: bool = False,
    oversize: str | Sequence[str] = "error",
    split_groups: bool = False,
    drop_last: bool = False,
    window: int = 64,
    rank: int = 0,
    world_size: int = 1,
    packs_per_step: int = 1,
    cost: CostModel | None = None,
    weight: Callable[[Any], float] | None = None,
    skip: int = 0,
) -> PackPlans:
    """:func:`packs` without the tensors: plans whose ``batch()`` another process may call.

    Groups may also be items, checked before; their index, name and weight are then their own.
    """
    check_share(share)
    for name, value, least in (
        ("max_tokens", max_tokens, 1),
        ("seed", seed, 0),
        ("epoch", epoch, 0),
        ("window", window, 1),
        ("world_size", world_size, 1),
        ("rank", rank, 0),
        ("packs_per_step", packs_per_step, 1),
        ("skip", skip, 0),
    ):
        check_int(name, value, least)
    if rank >= world_size:
        raise ValueError(f"rank must be below world_size={world_size}, got {rank}")
    if isinstance(groups, (Group, Rollout, Mapping, str)) or not (isinstance(groups, Iterable) or is_indexable(groups)):
        raise TypeError(f"packs() takes an iterable of groups, got one {type(groups).__name__}; wrap it in a list")
    report = PackingReport(max_tokens)
    budget = Budget(max_tokens, share, check_policies(oversize), split_groups)
    order_rng, fill_rng, rows_rng = (np.random.default_rng(s) for s in np.random.SeedSequence((seed, epoch)).spawn(3))
    items = read_items(groups, budget, weight, order_rng if shuffle else None, report)
    made = fill_windows(items, budget, window, fill_rng if shuffle else None)
    dealer = Dealer(
        world_size=world_size,
        packs_per_step=packs_per_step,
        at_once=window,
        cost=cost or CostModel(),
        share=share,
        sort=sort,
        split_groups=split_groups,
        drop_last=drop_last,
        rng=rows_rng if shuffle else None,
        report=report,
    )
    mine = _plans_of(dealer.steps(made), rank, share, report)
    return PackPlans(islice(mine, skip, None), report)


def _plans_of(steps: Iterable[Step], rank: int, share: str, report: PackingReport) -> Iterator[PackPlan]:
    for step in steps:
        for row in step.rows:
            for pack in row:
                report.packs += 1
                report.tokens += pack.work.tokens
                report.parts += sum(item.is_part for item in pack.items)
                report.unpacked_tokens += sum(item.record.unpacked_tokens for item in pack.items)
            yield PackPlan(tuple(row[rank].items), share, row[rank].work, step.totals)
