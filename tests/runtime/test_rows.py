"""Packs as rows of whole sequences, and back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppcompile.runtime.batch import Group, PackedBatch, pack
from ppcompile.runtime.rows import repack, unpack, unpacked_rows

ids = st.lists(st.integers(0, 3), min_size=1, max_size=6)
groups = st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=4)), min_size=1, max_size=4)


def packed(some: list[tuple[list[int], list[list[int]]]], padding: int) -> PackedBatch:
    return pack([Group(prompt, responses) for prompt, responses in some], share="tree", pad_to_multiple_of=padding)


@settings(deadline=None, max_examples=150)
@given(some=groups, padding=st.sampled_from([1, 16]))
def test_every_sequence_stands_whole_in_a_row(some: list[tuple[list[int], list[list[int]]]], padding: int) -> None:
    batch = packed(some, padding)
    rows, copies = unpacked_rows(batch.segments, batch.position_ids)
    texts = [batch.input_ids[0][row].tolist() for row in rows]
    for prompt, responses in some:
        for response in responses:
            sequence = [*prompt, *response]
            assert any(text[: len(sequence)] == sequence for text in texts)
    real = slice(0, batch.num_tokens)
    assert torch.equal(rows.flatten()[copies][real], torch.arange(batch.num_slots)[real])


@pytest.mark.parametrize(("token_axis", "batch_axis"), list(itertools.permutations(range(4), 2)))
def test_unpack_and_repack_on_any_axes(token_axis: int, batch_axis: int) -> None:
    batch = packed([([1, 2], [[3, 4], [0]]), ([1], [[2, 3, 3]])], 16)
    rows, copies = unpacked_rows(batch.segments, batch.position_ids)
    shape = [3, 5, 7, 2]
    shape[token_axis], shape[batch_axis] = batch.num_slots, 1
    packed_x = torch.randn(shape)
    x = unpack(packed_x, rows, token_axis, batch_axis)
    for number, row in enumerate(rows):
        one = packed_x.index_select(token_axis, row)
        assert torch.equal(x.narrow(batch_axis, number, 1), one)
    back = repack(x, copies, token_axis, batch_axis)
    real = (token_axis, 0, batch.num_tokens)
    assert back.shape == packed_x.shape
    assert torch.equal(back.narrow(*real), packed_x.narrow(*real))
