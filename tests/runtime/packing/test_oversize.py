"""Groups beyond the budget: each policy does what it says and no more, and is counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import ENTRIES, items_of, sequences_of, stored_tokens

from ppcompile.runtime.groups import Group, Rollout
from ppcompile.runtime.packing.oversize import POLICIES, Budget, check_policies, size_of
from ppcompile.runtime.packing.report import PackingReport

SHARES = st.sampled_from(["prompt", "tree"])
quick = settings(max_examples=150, deadline=None)


def fit(entry, max_tokens, *policies, share="prompt", split_groups=False):
    report = PackingReport(max_tokens)
    budget = Budget(max_tokens, share, policies, split_groups)
    return budget.fit(items_of([entry])[0], report), report


def sequences(items) -> list[list[int]]:
    return [list(s) for item in items for s in sequences_of(item)]


GROUP = Group([1, 2, 3, 4], [[5, 6, 7, 8, 9], [5, 6], [7, 8, 9]])  # 14 tokens, 12 as a tree


@pytest.mark.parametrize("policy", POLICIES)
def test_a_group_that_fits_is_left_alone(policy):
    (item,), report = fit(GROUP, 14, policy)
    assert sequences([item]) == [[1, 2, 3, 4, *r] for r in GROUP.responses]
    assert (report.cut_groups, report.dropped_groups) == (0, 0)
    assert len(fit(GROUP, 12, policy, share="tree")[0]) == 1, "what the trie takes is what counts"


def test_error_names_the_group_its_sizes_and_the_ways_out():
    with pytest.raises(ValueError, match=r"group 0 \(prompt 4, responses 5, 2, 3: 14 tokens\).*max_tokens=13") as error:
        fit(GROUP, 13, "error")
    assert "Nothing was dropped or cut" in str(error.value)
    assert "'keep_start', 'keep_end', 'split', 'drop'" in str(error.value)


def test_keep_start_cuts_the_ends_to_one_length():
    (item,), report = fit(GROUP, 12, "keep_start")
    assert sequences([item]) == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8, 9]]
    assert (report.cut_groups, report.cut_tokens) == (1, 2)
    assert "cut 2 tokens (keep_start) of group 0" in str(report)


def test_keep_start_leaves_every_sequence_something_to_score():
    (item,), _ = fit(GROUP, 7, "keep_start")
    assert sequences([item]) == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 7]]
    with pytest.raises(ValueError, match="oversize=keep_start could not make it fit"):
        fit(GROUP, 6, "keep_start")
    assert len(fit(GROUP, 6, "keep_start", share="tree")[0]) == 1, "5 is stored once there"


def test_keep_end_cuts_the_beginning_of_the_prompt():
    (item,), report = fit(GROUP, 12, "keep_end")
    assert sequences([item]) == [[3, 4, *r] for r in GROUP.responses]
    assert (report.cut_groups, report.cut_tokens) == (1, 2)
    assert sequences(fit(GROUP, 11, "keep_end")[0])[1] == [4, 5, 6], "one token of the prompt is left"
    with pytest.raises(ValueError, match="keep_end could not"):
        fit(GROUP, 10, "keep_end")


def test_split_repeats_the_prompt_and_fills_the_parts():
    parts, _ = fit(GROUP, 9, "split")
    assert sorted(map(tuple, sequences(parts))) == sorted((1, 2, 3, 4, *r) for r in GROUP.responses)
    assert [list(part.sequences) for part in parts] == [[0], [1, 2]]
    assert sum(part.weight for part in parts) == 3


def test_what_one_policy_cannot_do_the_next_one_may():
    with pytest.raises(ValueError, match="oversize=split could not"):
        fit(GROUP, 8, "split")
    parts, report = fit(GROUP, 8, "split", "keep_start")
    assert sorted(sequences(parts)) == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 7, 8, 9]]
    assert (report.cut_groups, report.cut_tokens, report.dropped_sequences) == (1, 1, 0)
    parts, report = fit(GROUP, 6, "split", "keep_start")
    assert (report.cut_groups, report.cut_tokens) == (1, 4), "two sequences of one group"
    parts, report = fit(GROUP, 8, "split", "drop")
    assert sorted(sequences(parts)) == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8, 9]]
    assert (report.dropped_groups, report.dropped_sequences) == (1, 1)


def test_drop_is_counted_and_named():
    parts, report = fit(GROUP, 5, "drop")
    assert parts == []
    assert (report.dropped_groups, report.dropped_sequences) == (1, 3)
    assert "dropped 3 of group 0 (prompt 4, responses 5, 2, 3: 14 tokens)" in str(report)


def test_groups_that_packs_may_split_need_only_fit_sequence_by_sequence():
    (item,), _ = fit(GROUP, 9, "error", split_groups=True)
    assert item.record.num_sequences == 3
    with pytest.raises(ValueError, match=r"responses 5: 9 tokens\).*max_tokens=8"):
        fit(GROUP, 8, "error", split_groups=True)
    parts, report = fit(GROUP, 8, "drop", split_groups=True)
    assert [list(part.sequences) for part in parts] == [[1, 2]]
    assert report.dropped_sequences == 1


def test_rollouts_are_cut_around_what_they_score():
    rollouts = [Rollout([1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 1, 0, 1, 1]), Rollout([1, 2, 3, 9], [0, 0, 0, 1])]
    (item,), _ = fit(rollouts, 6, "keep_end")
    assert sequences([item]) == [[3, 4, 5, 6, 7], [3, 9]]
    assert [mask.tolist() for mask in item.record.masks] == [[0, 1, 0, 1, 1], [0, 1]]
    (item,), _ = fit(rollouts, 6, "keep_start")
    assert sequences([item]) == [[1, 2, 3, 4, 5], [1, 2, 3, 9]]
    assert [mask.tolist() for mask in item.record.masks] == [[0, 0, 0, 1, 0], [0, 0, 0, 1]]
    with pytest.raises(ValueError, match="keep_start could not"):
        fit(rollouts, 4, "keep_start")


@quick
@given(ENTRIES, SHARES, st.integers(1, 12), st.permutations(POLICIES[1:]), st.integers(1, 4), st.booleans())
def test_what_comes_out_fits_scores_and_is_accounted_for(entries, share, max_tokens, order, tries, split_groups):
    for item in items_of(entries):
        report = PackingReport(max_tokens)
        try:
            parts = Budget(max_tokens, share, tuple(order[:tries]), split_groups).fit(item, report)
        except ValueError as error:
            if "could not make it fit" not in str(error):
                raise
            assert stored_tokens([item], share) > max_tokens
            continue
        kept = sorted(n for part in parts for n in part.sequences)
        assert len(set(kept)) == len(kept)
        assert len(kept) + report.dropped_sequences == item.record.num_sequences
        assert sum(part.weight for part in parts) == pytest.approx(len(kept))
        whole = dict(zip(item.sequences, sequences_of(item), strict=True))
        for part in parts:
            assert part.record.num_scored >= part.record.num_sequences
            size = stored_tokens([part], share)
            assert size == size_of(part.record, share)
            longest = max(map(len, sequences_of(part)))
            assert size <= max_tokens or (split_groups and longest <= max_tokens)
            for n, found in zip(part.sequences, sequences_of(part), strict=True):
                cut_start = whole[n][len(whole[n]) - len(found) :] == found
                cut_end = whole[n][: len(found)] == found
                assert found == whole[n] or (report.cut_groups and (cut_start or cut_end))


@quick
@given(ENTRIES, SHARES, st.integers(1, 12))
def test_no_longer_cut_would_have_fitted(entries, share, max_tokens):
    for item in items_of(entries):
        try:
            (cut,) = Budget(max_tokens, share, ("keep_start",), False).fit(item, PackingReport(max_tokens))
        except ValueError:
            continue
        longest = max(map(len, sequences_of(cut)))
        longer = {s[: longest + 1] for s in sequences_of(item)}
        if longest < max(map(len, sequences_of(item))):
            kept = [s[: longest + 1] for s in sequences_of(item)]
            if share == "tree":
                tokens = len({s[:n] for s in longer for n in range(1, len(s) + 1)})
            elif item.record.masks is None:
                tokens = len(item.record.prompt) + sum(len(s) - len(item.record.prompt) for s in kept)
            else:  # the common beginning of what is kept is the prompt
                common = min(len(s) for s in kept) - 1
                while len({s[:common] for s in kept}) > 1:
                    common -= 1
                tokens = common + sum(len(s) - common for s in kept)
            assert tokens > max_tokens


@pytest.mark.parametrize("bad", ["truncate", (), ("drop", "cut")])
def test_unknown_policies_are_named(bad):
    with pytest.raises(ValueError, match="is not accepted; take one of 'error', 'keep_start'"):
        check_policies(bad)


def test_masks_stay_with_their_sequences_when_a_group_is_split():
    rollouts = [Rollout([1, 2, n, n, n], np.eye(5)[n].astype(bool)) for n in (3, 4, 2)]
    parts, _ = fit(rollouts, 8, "split")
    for part in parts:
        for n, mask in zip(part.sequences, part.record.masks, strict=True):
            assert mask.tolist() == rollouts[n].completion_mask.tolist()
