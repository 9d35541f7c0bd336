"""Weighted by multiplicity, statistics over a pack are those of the unpacked sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppcompile

GROUPS = st.lists(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=2, max_size=5), min_size=1, max_size=4
)


@settings(max_examples=40, deadline=None)
@given(GROUPS, st.sampled_from(["prompt", "tree"]), st.sampled_from([1, 16]))
def test_each_token_counts_once_for_each_sequence(groups: list[list[list[int]]], share: str, multiple: int) -> None:
    batch = ppcompile.pack([ppcompile.Group(g[0], g[1:]) for g in groups], share=share, pad_to_multiple_of=multiple)
    weights = ppcompile.multiplicity(batch)
    assert weights.sum() == batch.unpacked_tokens
    counted = torch.zeros_like(weights)
    for slots in batch.sequence_slots():
        counted[torch.from_numpy(np.asarray(slots))] += 1
    assert torch.equal(weights, counted)


def test_the_load_of_experts_is_that_of_the_unpacked_rows() -> None:
    batch = ppcompile.pack([ppcompile.Group([1, 2, 3], [[4, 5], [6], [4, 7]])], share="tree", pad_to_multiple_of=8)
    experts = torch.nn.functional.one_hot(batch.input_ids[0] % 4, 4).double()  # the expert of a token, by its id
    weights = ppcompile.multiplicity(batch)
    unpacked = np.concatenate(batch.sequences()) % 4
    expected = torch.from_numpy(np.bincount(unpacked, minlength=4) / len(unpacked))
    assert torch.allclose((weights[:, None] * experts).sum(0) / weights.sum(), expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(experts.mean(0), expected)
