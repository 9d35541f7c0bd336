"""Filling packs: nothing lost or doubled, never beyond the budget, and full."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import ENTRIES, items_of, stored_tokens

from ppcompile.runtime.groups import Group
from ppcompile.runtime.packing.fill import _best_fit, fill_packs, pack_of
from ppcompile.runtime.packing.oversize import Budget
from ppcompile.runtime.packing.report import PackingReport

SHARES = st.sampled_from(["prompt", "tree"])
quick = settings(max_examples=120, deadline=None)


def placed(items) -> Counter:
    return Counter((item.index, n) for item in items for n in item.sequences)


@quick
@given(ENTRIES, SHARES, st.booleans(), st.integers(12, 40), st.sampled_from([0.0, 0.5]), st.integers(0, 5))
def test_every_sequence_is_packed_or_waits_and_no_pack_is_beyond_the_budget(
    entries, share, split, max_tokens, keep, seed
):
    budget = Budget(max_tokens, share, ("drop",), split)
    items = [part for item in items_of(entries) for part in budget.fit(item, PackingReport(max_tokens))]
    if not items:
        return
    rng = np.random.default_rng(seed) if seed else None
    packs, waiting = fill_packs(items, share=share, max_tokens=max_tokens, split=split, keep=keep, rng=rng)
    assert placed([item for pack in packs for item in pack.items] + waiting) == placed(items)
    assert packs
    assert keep or not waiting
    for pack in packs:
        assert pack.items
        assert pack.work.tokens == stored_tokens(pack.items, share) <= max_tokens
        assert pack_of(pack.items, share).work == pack.work
    if not split:
        names = [item.index for pack in packs for item in pack.items]
        assert len(names) == len(set(names)), "a group stands in one pack"


def random_groups(count: int, seed: int = 0, preamble: int = 0) -> list[Group]:
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 1000, preamble)
    sizes = np.exp(rng.normal(np.log(60), 0.6, (count, 3))).astype(int) + 1
    return [
        Group(np.append(start, rng.integers(0, 1000, p)), [rng.integers(0, 1000, a), rng.integers(0, 1000, b)])
        for p, a, b in sizes
    ]


@pytest.mark.parametrize("share", ["prompt", "tree"])
def test_packs_are_full(share):
    packs, _ = fill_packs(
        items_of(random_groups(300)), share=share, max_tokens=2000, split=False, keep=0, rng=np.random.default_rng(0)
    )
    fill = sorted(pack.work.tokens / 2000 for pack in packs)
    assert np.mean(fill[1:]) > 0.99


def test_groups_that_share_a_preamble_go_together():
    families = [random_groups(12, seed, preamble=400) for seed in range(4)]
    mixed = [group for row in zip(*families, strict=True) for group in row]
    packs, _ = fill_packs(
        items_of(mixed), share="tree", max_tokens=2600, split=False, keep=0, rng=np.random.default_rng(0)
    )
    tokens = sum(pack.work.tokens for pack in packs)
    own = sum(group.num_tokens - 400 for group in mixed)
    # Each pack can hold one preamble at the least; a few hold a second one where families meet.
    assert tokens - own <= 400 * (len(packs) + 3)


def test_groups_of_one_size_fill_packs_only_where_they_may_be_split():
    groups = [Group([n], [[n] * 39 for _ in range(10)]) for n in range(30)]  # 391 tokens each; 2.5 in a pack
    whole, _ = fill_packs(items_of(groups), share="prompt", max_tokens=1000, split=False, keep=0, rng=None)
    parts, _ = fill_packs(items_of(groups), share="prompt", max_tokens=1000, split=True, keep=0, rng=None)
    assert len(whole) == 15
    assert len(parts) == 12
    assert sum(len(pack.items) for pack in parts) < 30 + 12, "few groups are split"


@quick
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(30, 60))
def test_the_last_item_is_the_larger_of_the_best_pair(needs, space):
    item, filled, alone = _best_fit(np.array(needs), space)
    pairs = [needs[a] + needs[b] for a in range(len(needs)) for b in range(a)]
    assert filled == max([*needs, *(pair for pair in pairs if pair <= space)])
    assert alone == (filled == needs[item])
    if not alone:
        assert filled - needs[item] <= needs[item]
        assert filled - needs[item] in needs[:item] + needs[item + 1 :]


def test_without_a_generator_the_result_is_a_function_of_the_items():
    items = items_of(random_groups(50))
    first, second = (
        fill_packs(items, share="tree", max_tokens=2000, split=True, keep=0, rng=None)[0] for _ in range(2)
    )
    assert [placed(pack.items) for pack in first] == [placed(pack.items) for pack in second]
