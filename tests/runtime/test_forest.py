"""Forests against definitions written as Python loops over tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcompile.runtime import forest as forests
from ppcompile.runtime.forest import Forest

# Few distinct tokens, so that long common beginnings, duplicates and prefixes of one another are common.
ROWS = st.lists(st.integers(0, 2), min_size=1, max_size=8)
SEQUENCES = st.lists(ROWS, min_size=1, max_size=10)
GROUPS = st.lists(st.tuples(ROWS, st.lists(ROWS, min_size=1, max_size=4)), min_size=1, max_size=4)
quick = settings(max_examples=150, deadline=None)


def forest_from_sequences(sequences) -> Forest:
    flat = np.concatenate([np.asarray(row, np.int64) for row in sequences])
    return forests.forest_from_sequences(flat, np.array([len(row) for row in sequences]))


def forest_from_groups(groups) -> Forest:
    arrays = [(np.array(p, np.int64), [np.array(r, np.int64) for r in responses]) for p, responses in groups]
    return forests.forest_from_groups(arrays)


def sequence_slots(forest: Forest, n: int, start: int = 0) -> np.ndarray:
    starts = forest.lengths.copy()
    starts[n] = start
    return forest.slots(starts)


def visible_by_definition(forest: Forest) -> np.ndarray:
    """``[i, j]``: j is i's ancestor or i itself, by following predecessors one token at a time."""
    parent_slot = []
    for first, stop, _, parent in forest.segments.tolist():
        parent_slot.append(int(forest.segments[parent, 1]) - 1 if parent >= 0 else -1)
        parent_slot.extend(range(first, stop - 1))
    seen = np.zeros((forest.num_slots,) * 2, dtype=bool)
    for i in range(forest.num_slots):
        j = i
        while j >= 0:
            seen[i, j] = True
            j = parent_slot[j]
    return seen


def check(forest: Forest, sequences: list[list[int]]) -> None:
    """All that holds for any forest of these sequences."""
    assert forest.num_sequences == len(sequences)
    for n, sequence in enumerate(sequences):
        assert forest.sequence(n).tolist() == sequence
        slots = sequence_slots(forest, n)
        assert forest.positions[slots].tolist() == list(range(len(sequence)))
        for start in range(len(sequence) + 1):
            assert sequence_slots(forest, n, start).tolist() == slots[start:].tolist()
        # what a sequence's last slot sees is the sequence
        last = slots[-1]
        assert np.flatnonzero(forest.subtree_end[: last + 1] > last).tolist() == slots.tolist()
    slot = np.arange(forest.num_slots)
    interval = (slot[None] <= slot[:, None]) & (slot[:, None] < forest.subtree_end[None])
    assert (interval == visible_by_definition(forest)).all()
    used = {int(slot) for n in range(len(sequences)) for slot in sequence_slots(forest, n)}
    assert used == set(range(forest.num_slots)), "a slot that no sequence runs through"
    for array in (forest.tokens, forest.positions, forest.subtree_end, forest.segments, forest.leaf, forest.lengths):
        assert array.dtype == np.int64


@quick
@given(SEQUENCES)
def test_tree_keeps_every_sequence_and_stores_each_prefix_once(sequences):
    forest = forest_from_sequences(sequences)
    check(forest, sequences)
    prefixes = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    assert forest.num_slots == len(prefixes)


@quick
@given(SEQUENCES)
def test_tree_segments_are_maximal_and_siblings_begin_differently(sequences):
    forest = forest_from_sequences(sequences)
    below: dict[int, list[int]] = {}
    for s, parent in enumerate(forest.segments[:, 3].tolist()):
        below.setdefault(parent, []).append(s)
    for parent, children in below.items():
        assert parent == -1 or len(children) > 1, "a lone child belongs to its parent's segment"
        heads = forest.tokens[forest.segments[children, 0]].tolist()
        assert len(set(heads)) == len(heads)


@quick
@given(SEQUENCES)
def test_tree_siblings_stand_in_order_of_first_visit(sequences):
    forest = forest_from_sequences(sequences)
    visits = [int(slot) for n in range(len(sequences)) for slot in sequence_slots(forest, n)]
    first_visit = {slot: when for when, slot in reversed(list(enumerate(visits)))}
    below: dict[int, list[int]] = {}
    for first, _, _, parent in forest.segments.tolist():
        below.setdefault(parent, []).append(first_visit[first])
    assert all(times == sorted(times) for times in below.values())


@quick
@given(GROUPS)
def test_groups_keep_every_sequence_in_input_order(groups):
    forest = forest_from_groups(groups)
    check(forest, [prompt + response for prompt, responses in groups for response in responses])
    expected = [segment for prompt, responses in groups for segment in [prompt, *responses]]
    assert [forest.tokens[a:b].tolist() for a, b in forest.segments[:, :2]] == expected


@quick
@given(GROUPS)
def test_tree_equals_groups_where_nothing_else_is_shared(groups):
    # Distinct first tokens per prompt and per response, at least two responses: then the trie has nothing to merge.
    apart = [
        ([100 + g, *prompt], [[200 + r, *response] for r, response in enumerate([*responses, [0]])])
        for g, (prompt, responses) in enumerate(groups)
    ]
    tree = forest_from_sequences([prompt + response for prompt, responses in apart for response in responses])
    plain = forest_from_groups(apart)
    for name in ("tokens", "positions", "subtree_end", "segments", "leaf", "lengths"):
        assert (getattr(tree, name) == getattr(plain, name)).all(), name


def test_three_levels():
    forest = forest_from_sequences([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [1, 7], [8]])
    assert forest.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert forest.positions.tolist() == [0, 1, 2, 3, 3, 2, 1, 0]
    assert forest.subtree_end.tolist() == [7, 6, 5, 4, 5, 6, 7, 8]
    assert forest.segments[:, 3].tolist() == [-1, 0, 1, 2, 2, 1, 0, -1]


def test_duplicates_and_prefixes_share_their_slots():
    forest = forest_from_sequences([[1, 2], [1, 2, 3], [1], [1, 2, 3], [1, 2]])
    assert forest.tokens.tolist() == [1, 2, 3]
    assert forest.segments.tolist() == [[0, 3, 3, -1]]
    assert [int(sequence_slots(forest, n)[-1]) for n in range(5)] == [1, 2, 0, 2, 1]


def test_a_sequence_that_ends_where_a_later_fork_cuts():
    # [1 2] ends exactly at the fork that the third sequence brings, [1] inside the forked segment.
    forest = forest_from_sequences([[1, 2], [1, 2, 3, 4], [1, 2, 5], [1]])
    assert forest.segments[:, [0, 1, 3]].tolist() == [[0, 2, -1], [2, 4, 0], [4, 5, 0]]
    assert forest.leaf.tolist() == [0, 1, 2, 0]


def test_duplicate_responses_of_a_group_stay_apart():
    forest = forest_from_groups([([1, 2], [[3], [3]]), ([1, 2], [[3]])])
    assert forest.tokens.tolist() == [1, 2, 3, 3, 1, 2, 3]
    assert forest.segments[:, 3].tolist() == [-1, 0, 0, -1, 3]


def test_any_int64_token():
    big = np.iinfo(np.int64).max
    sequences = [[0, big], [0, -1], [-big - 1, 3], [0, big, 255], [0, 256]]
    check(forest_from_sequences(sequences), sequences)


@quick
@given(SEQUENCES, st.data())
def test_slots_of_all_sequences_from_any_token_on(sequences, data):
    forest = forest_from_sequences(sequences)
    starts = np.array([data.draw(st.integers(0, len(s))) for s in sequences])
    expected = [s for n, start in enumerate(starts) for s in sequence_slots(forest, n)[start:]]
    assert forest.slots(starts).tolist() == expected


def test_responses_without_a_prompt_are_roots():
    forest = forest_from_groups([([], [[1, 2], [1, 2]]), ([3], [[4]])])
    assert forest.segments[:, 3].tolist() == [-1, -1, -1, 2]
    assert [forest.sequence(n).tolist() for n in range(3)] == [[1, 2], [1, 2], [3, 4]]


def test_a_deep_chain_of_forks_needs_no_recursion():
    sequences = [[0] * n + [1] for n in range(3000, 0, -1)]
    forest = forest_from_sequences(sequences)
    assert forest.num_slots == 6000
    assert forest.sequence(0).tolist() == sequences[0]
