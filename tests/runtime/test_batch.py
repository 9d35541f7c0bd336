"""Packs: every sequence comes back, every scored token is asked for in the right place."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcompile.runtime.batch import Group, PackedBatch, pack

ROWS = st.lists(st.integers(0, 2), min_size=1, max_size=7)
GROUPS = st.lists(st.tuples(ROWS, st.lists(ROWS, min_size=1, max_size=4)), min_size=1, max_size=4)
SHARES = st.sampled_from(["prompt", "tree"])
quick = settings(max_examples=150, deadline=None)


def unpacked(groups) -> list[tuple[list[int], list[int]]]:
    return [(prompt, response) for prompt, responses in groups for response in responses]


@quick
@given(GROUPS, SHARES, st.integers(1, 9))
def test_every_sequence_is_read_back_from_the_layout(groups, share, multiple):
    batch = pack(groups, share=share, pad_to_multiple_of=multiple)
    assert [s.tolist() for s in batch.sequences()] == [p + r for p, r in unpacked(groups)]
    assert batch.prompt_lengths.tolist() == [len(p) for p, _ in unpacked(groups)]
    assert batch.lengths.tolist() == [len(r) for _, r in unpacked(groups)]
    for slots in batch.sequence_slots():
        assert batch.position_ids[0, slots].tolist() == list(range(len(slots)))


@quick
@given(GROUPS, SHARES, st.integers(1, 9))
def test_scored_tokens_have_the_predecessor_and_target_of_the_unpacked_sequence(groups, share, multiple):
    batch = pack(groups, share=share, pad_to_multiple_of=multiple)
    expected = []
    for slots, (prompt, response) in zip(batch.sequence_slots(), unpacked(groups), strict=True):
        expected += [(int(slots[len(prompt) + n - 1]), token) for n, token in enumerate(response)]
    predecessors, targets = (x[batch.scored_index].tolist() for x in (batch.predecessors, batch.targets))
    assert list(zip(predecessors, targets, strict=True)) == expected
    responses = unpacked(groups)
    assert batch.response_index.tolist() == [r for r, (_, response) in enumerate(responses) for _ in response]


@quick
@given(GROUPS, SHARES)
def test_each_scored_slot_is_computed_once(groups, share):
    batch = pack(groups, share=share)
    scored = {
        int(s)
        for slots, n in zip(batch.sequence_slots(), batch.prompt_lengths.tolist(), strict=True)
        for s in slots[n:]
    }
    assert len(batch.predecessors) == len(batch.targets) == len(scored)
    assert sorted(set(batch.scored_index.tolist())) == list(range(len(scored)))


@quick
@given(GROUPS, SHARES, st.integers(1, 9))
def test_counts(groups, share, multiple):
    batch = pack(groups, share=share, pad_to_multiple_of=multiple, pad_token_id=7)
    pairs = unpacked(groups)
    assert (batch.num_groups, batch.num_responses, len(batch)) == (len(groups), len(pairs), len(groups))
    assert batch.num_slots % multiple == 0
    assert 0 <= batch.num_slots - batch.num_tokens < multiple
    assert batch.unpacked_tokens == sum(len(p) + len(r) for p, r in pairs)
    assert batch.tokens_saved == batch.unpacked_tokens - batch.num_tokens
    assert batch.max_position == max(len(p) + len(r) for p, r in pairs) - 1 == batch.position_ids.max()
    assert batch.max_token_id == batch.input_ids.max()
    assert batch.group_sizes.tolist() == [len(responses) for _, responses in groups]
    assert batch.group_of_response().tolist() == [g for g, (_, rs) in enumerate(groups) for _ in rs]
    if share == "prompt":
        assert batch.num_tokens == sum(Group(*g).num_tokens for g in groups)
    assert batch.unpacked_tokens == sum(Group(*g).unpacked_tokens for g in groups)


@quick
@given(GROUPS, SHARES)
def test_padding_changes_nothing_else_and_is_seen_by_nobody(groups, share):
    plain = pack(groups, share=share)
    padded = pack(groups, share=share, pad_to_multiple_of=plain.num_slots + 3, pad_token_id=9)
    tokens = plain.num_tokens
    assert padded.input_ids[0].tolist() == [*plain.input_ids[0].tolist(), 9, 9, 9]
    assert padded.position_ids[0].tolist() == [*plain.position_ids[0].tolist(), 0, 0, 0]
    assert padded.subtree_end[:tokens].tolist() == plain.subtree_end.tolist()
    for name in ("predecessors", "targets", "scored_index", "last_slots", "lengths", "response_index"):
        assert torch.equal(getattr(padded, name), getattr(plain, name))
    slot = torch.arange(padded.num_slots)
    seen = (slot[None] <= slot[:, None]) & (slot[:, None] < padded.subtree_end[None])
    assert not seen[tokens:, :tokens].any()
    assert not seen[:tokens, tokens:].any()
    assert seen.diagonal().all(), "padding sees itself, so that no softmax is empty"


def test_first_token_of_every_response_is_predicted_by_the_prompts_last_slot():
    batch = pack([Group([1, 2, 3], [[4, 5], [6], [4]])])
    assert batch.predecessors.tolist() == [2, 3, 2, 2]
    assert batch.targets.tolist() == [4, 5, 6, 4]


def test_tree_scores_a_shared_word_once_and_counts_it_for_each_response():
    batch = pack([Group([1, 2], [[3, 4], [3, 5], [3]]), Group([1, 2, 3], [[4]])], share="tree")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.predecessors.tolist() == [1, 2, 2]
    assert batch.scored_index.tolist() == [0, 1, 0, 2, 0, 1]
    assert batch.response_index.tolist() == [0, 0, 1, 1, 2, 3]
    assert batch.prompt_lengths.tolist() == [2, 2, 2, 3]


def test_forms_of_groups_and_rows():
    prompt, responses = [1, 2], [[3], [4, 5]]
    wanted = pack([Group(prompt, responses)])
    forms = [
        (prompt, responses),
        {"prompt": prompt, "responses": responses},
        Group(torch.tensor(prompt), [torch.tensor(r, dtype=torch.int32) for r in responses]),
        Group(np.array(prompt, np.uint16), tuple(np.array(r) for r in responses)),
        Group(range(1, 3), [[np.int64(3)], (4, 5)]),
    ]
    for form in forms:
        batch = pack(iter([form]))
        for name in ("input_ids", "segments", "predecessors", "targets", "scored_index"):
            assert torch.equal(getattr(batch, name), getattr(wanted, name)), name


def test_a_pack_never_shares_memory_with_its_input():
    prompt, response = np.array([1, 2]), torch.tensor([3])
    batch = pack([Group(prompt, [response])])
    prompt[:], response[:] = 0, 0
    assert batch.input_ids.tolist() == [[1, 2, 3]]
    assert batch.targets.tolist() == [3]


# --------------------------------------------------------------------------- as an object


def test_repr_is_one_short_line():
    batch = pack([([1] * 300, [[2] * 200, [3] * 100]), ([4] * 500, [[5] * 20])], pad_to_multiple_of=128)
    assert str(batch) == "PackedBatch(2 groups, 3 responses, 1,120 tokens in 1,152 slots, 21% saved of 1,420)"
    assert repr(pack([([1], [[2]])])) == "PackedBatch(1 group, 1 response, 2 tokens in 2 slots, 0% saved of 2)"


def test_to_moves_all_but_what_the_host_reads():
    batch = pack([([1, 2], [[3], [4]])])
    moved = batch.to("meta", non_blocking=True)
    assert isinstance(moved, PackedBatch)
    assert moved.device.type == "meta"
    stayed = {name for name, v in vars(moved).items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
    assert stayed == {"segments", "group_sizes", "group_index", "sequence_index"}
    assert batch.device.type == "cpu"
    assert moved.num_slots == batch.num_slots
    assert repr(moved) == repr(batch)


def test_survives_pickling():
    batch = pack([([1, 2], [[3], [4]])])
    again = pickle.loads(pickle.dumps(batch))
    assert [s.tolist() for s in again.sequences()] == [[1, 2, 3], [1, 2, 4]]


# --------------------------------------------------------------------------- errors

GOOD = ([1], [[2], [3]])


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (([], [[1]]), ValueError, "prompt of group 1 is empty.*Try"),
        (([1], []), ValueError, "group 1 has no responses; accepted: one or more"),
        (([1], [[1], []]), ValueError, "response 1 of group 1 is empty"),
        (([1, 2.5], [[1]]), TypeError, "prompt of group 1 holds float64 values such as 1.0"),
        (([1], [[True]]), TypeError, "response 0 of group 1 holds bool"),
        (([1], [torch.tensor([1.0], dtype=torch.bfloat16)]), TypeError, "response 0 of group 1 holds float"),
        ((["a", "b"], [[1]]), TypeError, "prompt of group 1 holds <U1 values such as a.*tokenize"),
        (("ab", [[1]]), TypeError, "prompt of group 1 is of type str"),
        ((None, [[1]]), TypeError, "prompt of group 1 is of type NoneType"),
        (([1], [[1], [2, -100]]), ValueError, "response 1 of group 1 holds -100 at index 1.*label masks"),
        (([[1, 2]], [[1]]), ValueError, r"prompt of group 1 is nested: shape \[1, 2\].*batch dimension"),
        (([[1], [2, 3]], [[1]]), ValueError, "prompt of group 1 is nested"),
        (([1], torch.ones(1, 2, 3, dtype=torch.int64)), ValueError, "response 0 of group 1 is nested"),
        (([1], [2, 3]), TypeError, r"response 0 of group 1 is of type int.*responses=\[\[...\]\]"),
        (([1], "ab"), TypeError, "responses of group 1 are of type str"),
        (([1], 5), TypeError, "responses of group 1 are of type int"),
        ([[1], [[2]]], TypeError, "group 1 is of type list of length 2; accepted: Group"),
        (([1], [[2]], [[3]]), TypeError, "group 1 is of type tuple of length 3"),
        (17, TypeError, "group 1 is of type int"),
        ({"prompt": [1], "chosen": [2]}, ValueError, r"keys \['chosen', 'prompt'\].*responses=\[chosen, rejected\]"),
        ({"prompt": [1], "responses": [[2]], "id": 3}, ValueError, "exactly 'prompt' and 'responses'"),
    ],
)
def test_errors_say_what_came_in_and_where(bad, kind, message):
    with pytest.raises(kind, match=message):
        pack([GOOD, bad])


@pytest.mark.parametrize("groups", [Group([1], [[2]]), {"prompt": [1], "responses": [[2]]}, 5, "ab"])
def test_one_group_must_stand_in_a_list(groups):
    with pytest.raises(TypeError, match="takes a list of groups"):
        pack(groups)


def test_no_groups():
    with pytest.raises(ValueError, match="got no groups"):
        pack([])


def test_options_are_checked():
    with pytest.raises(ValueError, match="share='trie' is unknown; accepted: 'prompt', 'tree'"):
        pack([GOOD], share="trie")
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1, got 0"):
        pack([GOOD], pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="pad_token_id must be at least 0, got -100"):
        pack([GOOD], pad_token_id=-100)
    with pytest.raises(TypeError, match="max_tokens must be an int, got float"):
        pack([GOOD], max_tokens=1e4)


def test_budget_names_the_group_that_does_not_fit():
    group = ([1] * 10, [[1] * 5, [2] * 3])
    assert pack([group] * 2, max_tokens=36, pad_to_multiple_of=64).num_tokens == 36
    with pytest.raises(ValueError, match=r"group 2 \(prompt 10, responses 5, 3: 18 tokens\).*36 of max_tokens=40") as e:
        pack([group] * 4, max_tokens=40)
    assert "all 4 groups need 72" in str(e.value)
    assert "another pack" in str(e.value)
    with pytest.raises(ValueError, match=r"group 2 .*36 of max_tokens=36"):
        pack([group] * 3, max_tokens=36)
    with pytest.raises(ValueError, match=r"group 0 .*0 of max_tokens=17 are taken.*shorten or split"):
        pack([group], max_tokens=17)


def test_budget_of_a_tree_counts_what_is_shared_once():
    group = ([1] * 10, [[1] * 5, [2] * 3])
    assert pack([group] * 4, share="tree", max_tokens=18).num_tokens == 18
    with pytest.raises(ValueError, match=r"group 4 .* 2 tokens\).*18 of max_tokens=19"):
        pack([*[group] * 4, ([1] * 10, [[3, 3]])], share="tree", max_tokens=19)
