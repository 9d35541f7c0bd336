"""Rollouts: whole sequences with a mask, alone or in groups, against their unpacked definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcompile.runtime.batch import PackedBatch, pack
from ppcompile.runtime.groups import Group, Rollout, as_record

quick = settings(max_examples=150, deadline=None)
SHARES = st.sampled_from(["prompt", "tree"])


@st.composite
def rollouts(draw) -> Rollout:
    ids = draw(st.lists(st.integers(0, 2), min_size=2, max_size=9))
    mask = [0, *draw(st.lists(st.integers(0, 1), min_size=len(ids) - 1, max_size=len(ids) - 1))]
    if not any(mask):
        mask[draw(st.integers(1, len(ids) - 1))] = 1
    return Rollout(ids, mask)


GROUPS = st.builds(
    Group,
    st.lists(st.integers(0, 2), min_size=1, max_size=5),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=3),
)
ENTRIES = st.lists(st.one_of(GROUPS, rollouts(), st.lists(rollouts(), min_size=1, max_size=4)), min_size=1, max_size=4)


def unpacked(entries) -> list[tuple[list[int], list[int]]]:
    """Every sequence with the positions that it scores, by definition."""
    found = []
    for entry in entries:
        if isinstance(entry, Group):
            for response in entry.responses:
                positions = range(len(entry.prompt), len(entry.prompt) + len(response))
                found.append(([*entry.prompt, *response], list(positions)))
            continue
        for rollout in [entry] if isinstance(entry, Rollout) else entry:
            found.append((list(rollout.input_ids), [n for n, scored in enumerate(rollout.completion_mask) if scored]))
    return found


def scored(batch: PackedBatch) -> list[list[tuple[int, int]]]:
    """For each sequence, predecessor slot and target of its scored tokens."""
    pairs = zip(
        batch.predecessors[batch.scored_index].tolist(), batch.targets[batch.scored_index].tolist(), strict=True
    )
    lists: list[list[tuple[int, int]]] = [[] for _ in range(batch.num_responses)]
    for r, pair in zip(batch.response_index.tolist(), pairs, strict=True):
        lists[r].append(pair)
    return lists


@quick
@given(ENTRIES, SHARES, st.integers(1, 9))
def test_sequences_and_scored_tokens_are_those_of_the_unpacked_definition(entries, share, multiple):
    batch = pack(entries, share=share, pad_to_multiple_of=multiple)
    expected = unpacked(entries)
    assert [s.tolist() for s in batch.sequences()] == [ids for ids, _ in expected]
    slots = batch.sequence_slots()
    wanted = [[(int(slots[r][p - 1]), ids[p]) for p in positions] for r, (ids, positions) in enumerate(expected)]
    assert scored(batch) == wanted
    assert batch.lengths.tolist() == [len(positions) for _, positions in expected]
    assert batch.sequence_lengths.tolist() == [len(ids) for ids, _ in expected]
    assert batch.scored_positions.tolist() == [p for _, positions in expected for p in positions]
    assert batch.prompt_lengths.tolist() == [positions[0] for _, positions in expected]


@quick
@given(ENTRIES, SHARES)
def test_each_scored_slot_is_computed_once(entries, share):
    batch = pack(entries, share=share)
    slots = batch.sequence_slots()
    unique = {int(slots[r][p]) for r, (_, positions) in enumerate(unpacked(entries)) for p in positions}
    assert len(batch.predecessors) == len(unique)


@quick
@given(ENTRIES, SHARES, st.integers(1, 9))
def test_visibility_is_ancestry_by_brute_force(entries, share, multiple):
    """Slot j is visible to slot i iff some sequence runs through j and then i, or they are the same slot."""
    batch = pack(entries, share=share, pad_to_multiple_of=multiple)
    slot = np.arange(batch.num_tokens)
    end = batch.subtree_end.numpy()[: batch.num_tokens]
    expected = np.eye(batch.num_tokens, dtype=bool)
    for slots in batch.sequence_slots():
        for n, i in enumerate(slots):
            expected[i, slots[: n + 1]] = True
    assert ((slot[None] <= slot[:, None]) & (slot[:, None] < end[None]) == expected).all()


@quick
@given(ENTRIES)
def test_tree_stores_every_prefix_once_and_prompt_never_more_than_unshared(entries):
    sequences = [ids for ids, _ in unpacked(entries)]
    prefixes = {tuple(ids[:n]) for ids in sequences for n in range(1, len(ids) + 1)}
    assert pack(entries, share="tree").num_tokens == len(prefixes)
    prompt = pack(entries, share="prompt")
    assert len(prefixes) <= prompt.num_tokens <= prompt.unpacked_tokens == sum(map(len, sequences))


def test_which_input_and_which_sequence_of_it():
    turn = Rollout([1, 2], [0, 1])
    batch = pack([turn, [turn, turn, turn], ([1], [[2], [3]])])
    assert batch.group_index.tolist() == [0, 1, 2]
    assert batch.group_sizes.tolist() == [1, 3, 2]
    assert batch.sequence_index.tolist() == [0, 0, 1, 2, 0, 1]
    assert batch.step is None


def test_spans_with_holes_are_scored_from_the_slot_before_each():
    batch = pack([Rollout([5, 6, 7, 8, 9], [0, 1, 1, 0, 1])])
    assert batch.predecessors.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [6, 7, 9]


def test_a_token_scored_in_one_rollout_and_context_in_another_counts_for_the_first_alone():
    batch = pack([[Rollout([1, 2, 3], [0, 1, 1]), Rollout([1, 2, 4], [0, 0, 1])]], share="tree")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4]]
    assert scored(batch) == [[(0, 2), (1, 3)], [(1, 4)]]


def test_rollouts_of_a_group_share_the_beginning_that_all_have_and_end_apart():
    both = [Rollout([1, 2, 3], [0, 0, 1]), Rollout([1, 2, 3, 4], [0, 0, 1, 1]), Rollout([1, 2, 3], [0, 0, 1])]
    batch = pack([both], share="prompt")
    assert batch.input_ids.tolist() == [[1, 2, 3, 3, 4, 3]]
    assert pack([both[:1], both[1:2]], share="prompt").num_tokens == 7, "groups of their own share nothing"
    apart = pack([[Rollout([1, 2], [0, 1]), Rollout([3, 4], [0, 1])]])
    assert apart.segments[:, 3].tolist() == [-1, -1]


def test_forms_of_a_rollout():
    wanted = pack([Rollout([1, 2, 3], [0, 1, 1])])
    ids = torch.tensor([1, 2, 3])
    for entry in (
        Rollout(ids, torch.tensor([False, True, True])),
        Rollout(np.array([1, 2, 3], np.uint16), np.array([0, 1, 1], np.uint8)),
        {"input_ids": range(1, 4), "completion_mask": (False, True, True)},
        (Rollout(ids, [0, 1, 1]),),
        [Rollout(ids, [0, 1, 1])],
    ):
        batch = pack([entry])
        for name in ("input_ids", "predecessors", "targets", "scored_index", "segments"):
            assert torch.equal(getattr(batch, name), getattr(wanted, name)), name


def test_two_rollouts_in_a_tuple_are_not_a_prompt_and_responses():
    batch = pack([(Rollout([1, 2], [0, 1]), Rollout([1, 3], [0, 1]))])
    assert (batch.num_groups, batch.num_responses) == (1, 2)


@pytest.mark.parametrize(
    ("ids", "mask", "kind", "message"),
    [
        ([1, 2], [1, 1], ValueError, "completion_mask of group 1 scores the first token, which nothing predicts.*BOS"),
        ([1, 2], [0, 0], ValueError, "completion_mask of group 1 scores no token"),
        ([1, 2], [0], ValueError, r"completion_mask of group 1 has shape \[1\], input_ids \[2\]"),
        ([1, 2], [[0, 1]], ValueError, r"has shape \[1, 2\]"),
        ([1, 2], [0, 2], ValueError, "holds 2 at index 1; accepted: one 0 or 1"),
        ([1, 2], [0, -100], ValueError, "holds -100 at index 1"),
        ([1, 2], [0.0, 1.0], TypeError, "holds float64 values"),
        ([1, 2], None, TypeError, "completion_mask of group 1 is of type NoneType"),
        ([1, 2], "01", TypeError, "completion_mask of group 1 is of type str"),
        ([], [], ValueError, "input_ids of group 1 is empty"),
        ([1, -100], [0, 1], ValueError, "input_ids of group 1 holds -100 at index 1.*label masks"),
        ([1, 2**31], [0, 1], ValueError, "input_ids of group 1 holds 2147483648 at index 1"),
        ([[1, 2]], [0, 1], ValueError, "input_ids of group 1 is nested"),
    ],
)
def test_errors_say_what_came_in_and_where(ids, mask, kind, message):
    with pytest.raises(kind, match=message):
        pack([([1], [[2]]), Rollout(ids, mask)])


def test_errors_name_the_rollout_of_a_group():
    with pytest.raises(ValueError, match="completion_mask of rollout 1 of group 0 scores no token"):
        pack([[Rollout([1, 2], [0, 1]), Rollout([1, 2], [0, 0])]])


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        ({"input_ids": [1, 2]}, ValueError, r"keys \['input_ids'\]; accepted: exactly 'prompt' and 'responses', or"),
        ([Rollout([1, 2], [0, 1]), [1, 2]], TypeError, "type list of length 2; accepted: Group.*list of Rollouts"),
        ([], TypeError, "type list of length 0"),
    ],
)
def test_other_forms_are_refused(entry, kind, message):
    with pytest.raises(kind, match=message):
        pack([entry])


def test_one_rollout_must_stand_in_a_list():
    with pytest.raises(TypeError, match="takes a list of groups, got one Rollout"):
        pack(Rollout([1, 2], [0, 1]))


def test_records_know_their_sizes():
    record = as_record([Rollout([1, 2, 3], [0, 1, 1]), Rollout([1, 2, 4], [0, 0, 1])], "group 0")
    assert (record.num_tokens, record.unpacked_tokens, record.num_scored, record.num_sequences) == (4, 6, 3, 2)
    part = record.part([1])
    assert (part.num_tokens, part.num_scored) == (3, 1)
