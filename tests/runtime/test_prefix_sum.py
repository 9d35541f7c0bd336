"""Running sums along each sequence, by brute force."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppcompile
from ppcompile.runtime import ops


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=2, max_size=4), min_size=1))
def test_each_slot_holds_the_sum_over_its_ancestors_and_itself(groups: list[list[list[int]]]) -> None:
    batch = ppcompile.pack([ppcompile.Group(g[0], g[1:]) for g in groups], share="tree", pad_to_multiple_of=8)
    end = batch.subtree_end
    values = torch.randint(-5, 6, (2, end.numel(), 3), generator=torch.Generator().manual_seed(len(groups)))
    slot = torch.arange(end.numel())
    sees = (slot[None, :] <= slot[:, None]) & (slot[:, None] < end[None, :])
    expected = (sees[None, :, :, None] * values[:, None]).sum(2)
    assert torch.equal(ops.prefix_sum(values, end, 1), expected)
    assert torch.equal(ops.prefix_sum(values[0, :, 0].contiguous(), end, 0), expected[0, :, 0])


def test_the_op_keeps_its_contract() -> None:
    end = torch.tensor([4, 3, 3, 4])
    torch.library.opcheck(ops.prefix_sum, (torch.arange(8).view(1, 4, 2), end, 1))
