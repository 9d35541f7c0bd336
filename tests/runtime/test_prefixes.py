"""Sorted sequences and what neighbours share, against Python's own sorting and loops over tokens."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcompile.runtime import prefixes
from ppcompile.runtime.prefixes import common_prefix, sort_sequences

ROWS = st.lists(st.integers(0, 2), min_size=1, max_size=40)
quick = settings(max_examples=150, deadline=None)


def shared_by_loop(a: list[int], b: list[int]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count


def sort(sequences: list[list[int]], dtype=np.int32):
    flat = np.concatenate([np.array(s, dtype) for s in sequences])
    return sort_sequences(flat, np.array([len(s) for s in sequences]))


@quick
@given(st.lists(ROWS, min_size=1, max_size=12), st.sampled_from([np.uint8, np.int32, np.int64]))
def test_neighbours_share_what_a_loop_counts_and_the_trie_has_one_token_a_prefix(sequences, dtype):
    rows = sort(sequences, dtype)
    in_order = [sequences[n] for n in rows.order]
    assert sorted(rows.order.tolist()) == list(range(len(sequences)))
    expected = [0] + [shared_by_loop(a, b) for a, b in itertools.pairwise(in_order)]
    assert rows.shared.tolist() == expected
    assert rows.num_tokens == len({tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)})


@quick
@given(st.lists(ROWS, min_size=2, max_size=12))
def test_what_any_two_share_is_the_least_between_them(sequences):
    rows = sort(sequences)
    for a in range(len(sequences)):
        for b in range(a + 1, len(sequences)):
            found = rows.shared[a + 1 : b + 1].min()
            assert found == shared_by_loop(sequences[rows.order[a]], sequences[rows.order[b]])


def test_equal_ones_keep_their_order_and_a_beginning_comes_before_its_continuations():
    assert sort([[1, 2, 3], [1, 2], [1, 2, 3], [1]]).order.tolist() == [3, 1, 0, 2]


def test_long_common_beginnings_are_measured_in_pieces_of_every_size(monkeypatch):
    monkeypatch.setattr(prefixes, "_AT_ONCE", 64)  # so that pieces stop growing early, too
    common = list(range(5000))
    for length in (1, 15, 16, 17, 47, 48, 49, 1100, 4999, 5000):
        a, b = [*common[:length], 7, 7], [*common[:length], 8]
        assert sort([a, b]).shared.tolist() == [0, length]
        assert sort([a, common[:length]]).shared.tolist() == [0, length]


@quick
@given(ROWS, ROWS)
def test_common_prefix(a, b):
    assert common_prefix(np.array(a), np.array(b)) == shared_by_loop(a, b)
