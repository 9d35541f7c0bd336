"""Dealing packs to ranks: what is held back, what is divided, and what a step is told."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from packing_cases import items_of

from ppcompile.runtime.groups import Group
from ppcompile.runtime.packing.cost import CostModel
from ppcompile.runtime.packing.fill import pack_of
from ppcompile.runtime.packing.ranks import Dealer
from ppcompile.runtime.packing.report import PackingReport


def packs_of(*groups_in_each: int):
    items = iter(items_of([Group([1, 2], [[3] * (n % 5 + 1)]) for n in range(sum(groups_in_each))]))
    return [pack_of([next(items) for _ in range(count)], "prompt") for count in groups_in_each]


def dealer(world_size: int, **options) -> Dealer:
    defaults = {
        "packs_per_step": 1,
        "at_once": 1,
        "cost": CostModel(),
        "share": "prompt",
        "sort": False,
        "split_groups": False,
        "drop_last": False,
        "rng": np.random.default_rng(0),
        "report": PackingReport(100),
    }
    return Dealer(world_size=world_size, **{**defaults, **options})


def groups_in(steps) -> Counter:
    return Counter(item.index for step in steps for row in step.rows for pack in row for item in pack.items)


@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_packs_that_can_be_divided_are_held_back_until_the_end(world_size):
    """The stream ends with packs of one group; those of several, which came first, make the last row whole."""
    sizes = [3] * world_size + [1] * (5 * world_size + 1)
    steps = list(dealer(world_size).steps(packs_of(*sizes)))
    assert {len(row) for step in steps for row in step.rows} == {world_size}
    assert groups_in(steps) == Counter(range(sum(sizes)))


def test_one_rank_holds_nothing_back_and_keeps_the_order():
    packs = packs_of(1, 2, 1, 3, 1)
    steps = list(dealer(1, at_once=2, rng=None).steps(packs))
    assert [step.rows[0][0] for step in steps] == packs


def test_the_dearest_pack_is_divided_by_size():
    sizes = [30, 20, 10, 9]
    items = items_of([Group([1], [[2] * (size - 1)]) for size in sizes] + [Group([1], [[2] * 4])])
    dear, cheap = pack_of(items[:4], "prompt"), pack_of(items[4:], "prompt")
    one = dealer(3)
    (step,) = one.steps([dear, cheap])
    assert sorted(pack.work.tokens for pack in step.rows[0]) == [5, 30, 39]
    assert one.report.divided_packs == 1


def test_the_last_step_may_be_shorter_and_says_so():
    steps = list(dealer(2, packs_per_step=3).steps(packs_of(*[1] * 16)))
    assert [len(step.rows) for step in steps] == [3, 3, 2]
    assert [step.totals.packs for step in steps] == [6, 6, 4]
    assert [step.totals.index for step in steps] == [0, 1, 2]
    assert sum(step.totals.responses for step in steps) == 16


def test_what_cannot_be_made_even_is_an_error():
    with pytest.raises(ValueError, match="last 5 packs hold one group each and cannot feed 3 ranks"):
        list(dealer(3).steps(packs_of(*[1] * 5)))


def test_packs_that_do_not_suffice_for_all_ranks_are_an_error_or_left_out_and_counted():
    packs = packs_of(*[1] * 11)
    with pytest.raises(ValueError, match=r"the last \d packs hold one group each.*Try: .*drop_last=True"):
        list(dealer(4, at_once=4).steps(packs))
    one = dealer(4, drop_last=True)
    steps = list(one.steps(packs))
    assert [len(step.rows) for step in steps] == [1, 1]
    assert (one.report.dropped_groups, one.report.dropped_sequences) == (3, 3)
    left_out = {item.index for pack in packs for item in pack.items} - set(groups_in(steps))
    sizes = [pack.work.tokens for pack in packs]
    assert max(sizes[n] for n in left_out) <= min(sizes[n] for n in groups_in(steps[-1:]))
    assert {f"dropped 1 of group {n} (drop_last)" for n in left_out} == set(one.report.examples)
    assert sum(step.totals.responses for step in steps) == 8


def test_an_epoch_is_never_dropped_whole():
    with pytest.raises(ValueError, match=r"cannot feed 4 ranks evenly.*Try: fewer ranks, more data, or split_groups"):
        list(dealer(4, drop_last=True).steps(packs_of(1, 1, 1)))
