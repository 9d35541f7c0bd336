"""Tokens that waiting groups would add to the open pack, against counting prefixes in a set."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import ENTRIES, items_of, sequences_of, stored_tokens

from ppcompile.runtime.groups import Group
from ppcompile.runtime.packing.pool import Item, Work, make_pool

SHARES = st.sampled_from(["prompt", "tree"])
quick = settings(max_examples=150, deadline=None)


def pairs_by_definition(items: list[Item], share: str) -> int:
    """A token sees itself and what stands before it: its depth, summed over stored tokens."""
    if share == "tree":
        prefixes = {s[:n] for item in items for s in sequences_of(item) for n in range(1, len(s) + 1)}
        return sum(map(len, prefixes))
    total = 0
    for item in items:
        prompt = len(item.record.prompt)
        total += sum(range(1, prompt + 1))
        total += sum(sum(range(prompt + 1, prompt + len(r) + 1)) for r in item.record.responses)
    return total


def left_of(pool, n: int) -> Item:
    return pool.items[n].part(pool.left[n])


def check_needs(pool, packed: list[Item], share: str) -> None:
    base = stored_tokens(packed, share)
    for n in range(len(pool.items)):
        assert pool.waiting[n] == bool(pool.left[n])
        if pool.left[n]:
            assert pool.sizes[n] == stored_tokens([left_of(pool, n)], share)
            assert pool.needs[n] == stored_tokens([*packed, left_of(pool, n)], share) - base


@quick
@given(ENTRIES, SHARES, st.data())
def test_needs_and_work_are_exact_whatever_is_taken(entries, share, data):
    """Whole groups and parts of them, in any order, over several packs."""
    pool = make_pool(items_of(entries), share)
    packed: list[Item] = []
    work = Work(0, 0)
    check_needs(pool, packed, share)
    for _ in range(data.draw(st.integers(1, 8))):
        waiting = [n for n in range(len(pool.items)) if pool.left[n]]
        if not waiting:
            break
        if packed and data.draw(st.booleans()) and data.draw(st.booleans()):
            pool.open()
            packed, work = [], Work(0, 0)
            check_needs(pool, packed, share)
        n = data.draw(st.sampled_from(waiting))
        whole = data.draw(st.booleans())
        positions = (
            list(pool.left[n])
            if whole
            else data.draw(st.lists(st.sampled_from(list(pool.left[n])), min_size=1, unique=True))
        )
        packed.append(pool.items[n].part(sorted(positions)))
        work = work.plus(pool.take(n, None if whole else sorted(positions)))
        assert work == Work(stored_tokens(packed, share), pairs_by_definition(packed, share))
        check_needs(pool, packed, share)


@quick
@given(ENTRIES, SHARES, st.integers(1, 25), st.data())
def test_parts_fit_and_tell_what_they_add_and_repeat(entries, share, space, data):
    pool = make_pool(items_of(entries), share)
    packed = []
    for n in data.draw(st.lists(st.integers(0, len(entries) - 1), max_size=3, unique=True)):
        packed.append(pool.items[n])
        pool.take(n)
    base = stored_tokens(packed, share)
    for n in range(len(pool.items)):
        if not pool.left[n]:
            continue
        for part in pool.parts(n, space):
            rest = [p for p in pool.left[n] if p not in part.positions]
            assert rest
            assert part.positions
            assert set(part.positions) <= set(pool.left[n])
            added = stored_tokens([*packed, pool.items[n].part(part.positions)], share) - base
            assert part.added == added <= space
            twice = added + stored_tokens([pool.items[n].part(rest)], share) - pool.needs[n]
            assert part.repeated == twice


@pytest.mark.parametrize("share", ["prompt", "tree"])
def test_a_part_is_found_wherever_one_sequence_fits(share):
    pool = make_pool(items_of([Group([1, 2, 3], [[4] * 5, [5] * 9, [6] * 7])]), share)
    assert [part.positions for part in pool.parts(0, 7)] == []
    assert [0] in [part.positions for part in pool.parts(0, 8)]


def test_parts_share_the_weight_in_proportion():
    (item,) = items_of([Group([1], [[2], [3], [4], [5]])])
    half = item.part([1, 3])
    assert (half.weight, half.sequences, half.index) == (2, (1, 3), 0)
    assert half.part([1]).sequences == (3,)
    assert item.part(range(4)) is item
