"""``packs()``: lists and streams, one rank or many. Nothing is lost or doubled, and all of it can be repeated."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import ENTRIES, items_of, sequences_of

import ppcompile
from ppcompile.runtime.batch import pack
from ppcompile.runtime.groups import Group, Rollout
from ppcompile.runtime.packing.cost import CostModel
from ppcompile.runtime.packing.packs import packs, plan_packs

SHARES = st.sampled_from(["prompt", "tree"])
quick = settings(max_examples=100, deadline=None)


def random_groups(count: int, seed: int = 0, longest: int = 60) -> list[Group]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest, (count, 3))
    return [Group(rng.integers(0, 99, p), [rng.integers(0, 99, a), rng.integers(0, 99, b)]) for p, a, b in sizes]


def placed(batches) -> Counter:
    """(input, sequence of it) of every sequence in these packs."""
    found: Counter = Counter()
    for batch in batches:
        groups = np.repeat(batch.group_index.numpy(), batch.group_sizes.numpy())
        found.update(zip(groups.tolist(), batch.sequence_index.tolist(), strict=True))
    return found


def everything(entries) -> Counter:
    return Counter((item.index, n) for item in items_of(entries) for n in item.sequences)


def contents(plans) -> list[list[tuple[int, tuple[int, ...]]]]:
    return [[(item.index, tuple(item.sequences)) for item in plan.items] for plan in plans]


# --------------------------------------------------------------------------- what goes in comes out


@quick
@given(ENTRIES, SHARES, st.integers(40, 120), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 3))
def test_every_sequence_is_read_back_from_one_pack(entries, share, max_tokens, window, split, shuffle, epoch):
    expected = {(item.index, n): s for item in items_of(entries) for n, s in enumerate(sequences_of(item))}
    found = Counter()
    options = {"split_groups": split, "shuffle": shuffle, "epoch": epoch, "pad_to_multiple_of": 8}
    for batch in packs(entries, share=share, max_tokens=max_tokens, window=window, **options):
        assert batch.num_tokens <= max_tokens
        assert batch.num_slots % 8 == 0
        groups = np.repeat(batch.group_index.numpy(), batch.group_sizes.numpy()).tolist()
        for *key, sequence in zip(groups, batch.sequence_index.tolist(), batch.sequences(), strict=True):
            assert tuple(sequence.tolist()) == expected[tuple(key)]
            found[tuple(key)] += 1
    assert found == everything(entries)


@quick
@given(ENTRIES, SHARES, st.integers(1, 5), st.integers(1, 3), st.booleans(), st.booleans(), st.booleans())
def test_ranks_get_the_same_number_of_packs_and_together_everything_once(
    entries, share, world_size, packs_per_step, sort, stream, split
):
    def plans(rank):
        given_as = iter(entries) if stream else entries
        return list(
            plan_packs(
                given_as,
                share=share,
                max_tokens=80,  # any two groups fit
                window=1,
                rank=rank,
                world_size=world_size,
                packs_per_step=packs_per_step,
                sort=sort,
                split_groups=split,
            )
        )

    try:
        by_rank = [plans(rank) for rank in range(world_size)]
    except ValueError as error:
        if "cannot feed" not in str(error):
            raise
        # Possible only where there is too little to divide: each pack of the last row holds what stays together.
        assert sum(everything(entries).values() if split else [1] * len(entries)) < 2 * world_size
        return
    assert len({len(mine) for mine in by_rank}) == 1
    batches = [plan.batch() for mine in by_rank for plan in mine]
    assert placed(batches) == everything(entries)
    for step in zip(*by_rank, strict=True):
        assert len({plan.step for plan in step}) == 1, "all ranks are told the same totals"
    check_totals(by_rank, packs_per_step)


def check_totals(by_rank, packs_per_step: int) -> None:
    for first in range(0, len(by_rank[0]), packs_per_step):
        step = [plan for mine in by_rank for plan in mine[first : first + packs_per_step]]
        batches = [plan.batch() for plan in step]
        for plan, batch in zip(step, batches, strict=True):
            totals = plan.step
            assert totals is batch.step
            assert totals.index == first // packs_per_step
            assert totals.packs == len(step)
            assert totals.responses == sum(b.num_responses for b in batches) == pytest.approx(totals.weight)
            assert totals.scored_tokens == sum(int(b.lengths.sum()) for b in batches)


def test_fewer_groups_than_ranks_is_an_error_that_says_what_to_do():
    groups = random_groups(3)
    with pytest.raises(ValueError, match=r"cannot feed 4 ranks evenly.*Nothing was dropped or repeated.*fewer ranks"):
        list(packs(groups, world_size=4, max_tokens=500))
    shared = [placed(packs(groups, world_size=4, max_tokens=500, rank=r, split_groups=True)) for r in range(4)]
    assert sum(shared, Counter()) == everything(groups)


@pytest.mark.parametrize("stream", [False, True])
def test_the_last_packs_may_be_left_out_and_are_counted(stream):
    groups = [Group([n], [[n] * 60]) for n in range(37)]

    def ranks(drop_last):
        options = {"max_tokens": 100, "window": 2, "world_size": 4, "drop_last": drop_last}
        made = [packs(iter(groups) if stream else groups, rank=rank, **options) for rank in range(4)]
        return made, [list(mine) for mine in made]

    with pytest.raises(ValueError, match="the last 5 packs hold one group each and cannot feed 4 ranks evenly"):
        ranks(False)
    made, by_rank = ranks(True)
    assert [len(mine) for mine in by_rank] == [9] * 4
    found = sum(map(placed, by_rank), Counter())
    assert set(found.values()) == {1}
    assert len(found) == 36
    assert {(mine.report.dropped_groups, mine.report.dropped_sequences) for mine in made} == {(1, 1)}
    assert "dropped  1 sequences of 1 groups" in str(made[0].report)


def test_packs_of_one_group_each_do_not_strand_the_last_row_of_a_stream():
    """Most groups fill a pack alone; the few that share one are held back until the end."""
    groups = [Group([1] * 50, [[2] * 45])] * 40 + [Group([1] * 3, [[2] * 3])] * 40 + [Group([1] * 50, [[2] * 45])] * 41
    for world_size in (2, 4, 5):
        options = {"max_tokens": 100, "window": 2, "world_size": world_size}
        found = [placed(packs(iter(groups), rank=rank, **options)) for rank in range(world_size)]
        assert sum(found, Counter()) == everything(groups)


# --------------------------------------------------------------------------- repeatable, and fresh


def test_same_seed_and_epoch_same_packs_other_ones_other_packs():
    groups = random_groups(200)
    options = {"max_tokens": 600, "share": "tree"}
    first = contents(plan_packs(groups, seed=3, epoch=1, **options))
    assert contents(plan_packs(groups, seed=3, epoch=1, **options)) == first
    assert contents(plan_packs(groups, seed=3, epoch=2, **options)) != first
    assert contents(plan_packs(groups, seed=4, epoch=1, **options)) != first
    assert contents(plan_packs(groups, seed=1, epoch=3, **options)) != first


@pytest.mark.parametrize("share", ["prompt", "tree"])
def test_epochs_pack_other_groups_together(share):
    groups = random_groups(150)

    def together(epoch):
        found = set()
        for plan in plan_packs(groups, max_tokens=900, share=share, epoch=epoch):
            found |= {(a, b) for a in plan.group_index for b in plan.group_index if a < b}
        return found

    first, second = together(0), together(1)
    by_chance = len(second) / (150 * 149 / 2)
    assert len(first & second) / len(first) < 2 * by_chance


def test_without_shuffling_everything_is_a_function_of_the_data():
    groups = random_groups(60)
    plans = [contents(plan_packs(groups, max_tokens=600, shuffle=False, seed=s, epoch=s)) for s in (0, 1)]
    assert plans[0] == plans[1]
    assert plans[0] == contents(plan_packs(iter(groups), max_tokens=600, shuffle=False))


@pytest.mark.parametrize("world_size", [1, 3])
def test_skip_continues_where_a_run_stopped(world_size):
    groups = random_groups(120)
    options = {"max_tokens": 400, "world_size": world_size, "rank": world_size - 1, "packs_per_step": 2}
    whole = list(packs(groups, **options))
    for done in (0, 1, 7, len(whole), len(whole) + 3):
        rest = list(packs(groups, skip=done, **options))
        assert len(rest) == max(0, len(whole) - done)
        for a, b in zip(rest, whole[done:], strict=True):
            assert torch.equal(a.input_ids, b.input_ids)
            assert a.step == b.step


def test_plans_travel_to_other_processes():
    for plan in plan_packs(random_groups(20), max_tokens=300, share="tree"):
        batch, again = plan.batch(pad_token_id=5), pickle.loads(pickle.dumps(plan)).batch(pad_token_id=5)
        assert torch.equal(batch.input_ids, again.input_ids)
        assert batch.group_index.tolist() == plan.group_index
        assert batch.sequence_index.tolist() == plan.sequence_index
        assert batch.num_tokens == plan.work.tokens
        assert batch.step == again.step == plan.step


# --------------------------------------------------------------------------- streams


def test_a_stream_is_read_a_window_at_a_time():
    read = 0

    def stream():
        nonlocal read
        for group in random_groups(3000, longest=20):
            read += 1
            yield group

    batches = packs(stream(), max_tokens=300, window=4)
    next(batches)
    per_pack = 300 / (3 * 9.5)
    assert read < 20 * per_pack, "four packs' worth wait, and twice as many are being dealt"
    most = 0
    done = 0
    for batch in batches:
        done += batch.num_groups
        most = max(most, read - done)
    assert read == 3000
    assert most < 25 * per_pack


@pytest.mark.parametrize("share", ["prompt", "tree"])
def test_packs_are_full_across_windows(share):
    plans = plan_packs(iter(random_groups(600)), max_tokens=1000, window=4, share=share)
    fill = sorted(plan.work.tokens / 1000 for plan in plans)
    assert np.mean(fill[1:]) > 0.98


def test_streams_and_lists_hold_the_same_groups():
    groups = random_groups(100)
    assert placed(packs(iter(groups), max_tokens=500)) == placed(packs(groups, max_tokens=500)) == everything(groups)


def test_a_map_style_data_set_is_indexed():
    groups = random_groups(30)

    class Data:
        def __len__(self):
            return len(groups)

        def __getitem__(self, n):
            return groups[n]

    assert contents(plan_packs(Data(), max_tokens=500)) == contents(plan_packs(groups, max_tokens=500))


# --------------------------------------------------------------------------- costs, weights, report


def test_ranks_are_balanced_by_cost():
    rng = np.random.default_rng(0)
    long = [Group(rng.integers(0, 9, 700), [rng.integers(0, 9, 100)]) for _ in range(64)]
    short = [Group(rng.integers(0, 9, 5), [rng.integers(0, 9, 20), rng.integers(0, 9, 30)]) for _ in range(1500)]
    cost = CostModel(per_pair=1 / 300)
    rows = list(
        zip(
            *(plan_packs(long + short, max_tokens=1000, world_size=4, rank=r, cost=cost) for r in range(4)),
            strict=True,
        )
    )
    costs = np.array([[cost.predict(plan.work) for plan in row] for row in rows])
    assert costs.max() > 1.8 * costs.min(), "the data is not trivial"
    waiting = (costs.max(axis=1) - costs.mean(axis=1)).sum() / costs.sum(axis=1).mean() / len(rows)
    assert waiting < 0.02, "ranks wait for the dearest pack of a row"
    totals = costs.sum(axis=0)
    assert totals.max() < 1.02 * totals.min()


def test_sorted_packs_fall_in_cost():
    costs = [CostModel().predict(plan.work) for plan in plan_packs(random_groups(80), max_tokens=400, sort=True)]
    assert costs == sorted(costs, reverse=True)


def test_weights_are_summed_over_the_step_and_split_with_the_group():
    groups = [Group([n + 1], [[2] * 30] * 4) for n in range(9)]
    options = {"max_tokens": 150, "world_size": 2, "weight": lambda group: group.prompt[0], "split_groups": True}
    by_rank = [list(packs(groups, rank=r, **options)) for r in range(2)]
    assert sum(batch.step.weight for batch in by_rank[0]) == pytest.approx(sum(range(1, 10)))
    assert {batch.step.packs for batch in by_rank[0]} == {2}


@pytest.mark.parametrize("value", [float("nan"), -1, float("inf")])
def test_bad_weights_name_the_group(value):
    with pytest.raises(ValueError, match=r"weight of group \d is"):
        next(packs([([1], [[2]])], weight=lambda group: value))


def test_the_report_counts_and_reads():
    groups = [*random_groups(40), Group([1] * 500, [[2] * 5])]
    made = packs(groups, max_tokens=400, oversize="drop")
    batches = list(made)
    report = made.report
    assert (report.groups, report.sequences, report.dropped_groups) == (41, 81, 1)
    assert report.packs == len(batches)
    assert report.tokens == sum(b.num_tokens for b in batches)
    assert report.unpacked_tokens == sum(b.unpacked_tokens for b in batches)
    text = str(report)
    assert "41 with 81 sequences" in text
    assert "dropped  1 sequences of 1 groups" in text
    assert "dropped 1 of group 40 (prompt 500, responses 5: 505 tokens)" in text


def test_parts_and_divided_packs_are_reported():
    groups = [Group([n], [[n] * 39 for _ in range(10)]) for n in range(30)]
    made = packs(groups, max_tokens=1000, split_groups=True)
    assert sum(b.num_groups for b in made) - 30 < made.report.parts < 40
    even = packs(random_groups(50), max_tokens=600, world_size=7)
    list(even)
    assert even.report.divided_packs > 0
    assert "so that all ranks get as many" in str(even.report)


# --------------------------------------------------------------------------- errors


def test_errors_name_the_input():
    groups = random_groups(30)
    groups[17] = Group([1], [[]])
    with pytest.raises(ValueError, match="response 0 of group 17 is empty"):
        list(packs(groups))
    groups[17] = Group([1] * 900, [[2] * 101, [3]])
    with pytest.raises(ValueError, match=r"group 17 \(prompt 900, responses 101, 1: 1,002 tokens\).*max_tokens=1,000"):
        list(packs(groups, max_tokens=1000))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"share": "trie"}, ValueError, "share='trie' is unknown"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank must be below world_size=2"),
        ({"oversize": "truncate"}, ValueError, "oversize='truncate' is not accepted; take one of 'error'"),
        ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of must be at least 1"),
        ({"window": 0}, ValueError, "window must be at least 1"),
    ],
)
def test_options_are_checked_at_once(options, kind, message):
    with pytest.raises(kind, match=message):
        packs([([1], [[2]])], **options)


@pytest.mark.parametrize("groups", [Group([1], [[2]]), Rollout([1, 2], [0, 1]), {"prompt": [1]}, 5, "ab"])
def test_one_group_must_stand_in_a_list(groups):
    with pytest.raises(TypeError, match="takes an iterable of groups"):
        packs(groups)


def test_no_groups_is_an_error_and_says_why():
    stream = iter([([1], [[2]])])
    assert len(list(packs(stream))) == 1
    with pytest.raises(ValueError, match="got no groups; a generator can be read once only"):
        next(packs(stream))


def test_public_names():
    assert ppcompile.packs is packs
    (batch,) = ppcompile.packs([ppcompile.Rollout([1, 2, 3], [0, 1, 1])])
    assert torch.equal(batch.input_ids, pack([Rollout([1, 2, 3], [0, 1, 1])]).input_ids)
    assert len(list(islice(ppcompile.plan_packs(random_groups(5)), 1))) == 1
