"""Block lists against dense masks and torch's own, and the invariants of layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from ppcompile.runtime.batch import PackedBatch, pack
from ppcompile.runtime.layout import BlockLists, block_lists, block_lists_op, check_layout

ROWS = st.lists(st.integers(0, 1), min_size=1, max_size=25)
GROUPS = st.lists(st.tuples(ROWS, st.lists(ROWS, min_size=1, max_size=3)), min_size=1, max_size=3)
BATCHES = st.builds(
    lambda groups, share, multiple: pack(groups, share=share, pad_to_multiple_of=multiple),
    GROUPS,
    st.sampled_from(["prompt", "tree"]),
    st.sampled_from([1, 16]),
)
quick = settings(max_examples=100, deadline=None)


def dense_mask(batch: PackedBatch, window: int) -> torch.Tensor:
    slot = torch.arange(batch.num_slots)
    seen = (slot[None] <= slot[:, None]) & (slot[:, None] < batch.subtree_end[None])
    position = batch.position_ids[0]
    return seen & (position[:, None] - position[None] < window) if window else seen


def blocks_of(mask: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks with anything visible and blocks with everything visible; slots beyond T see nothing."""
    pad = -mask.shape[0] % size
    tiles = torch.nn.functional.pad(mask, (0, pad, 0, pad)).unflatten(0, (-1, size)).unflatten(2, (-1, size))
    return tiles.any(3).any(1), tiles.all(3).all(1)


def to_dense(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The set that a pair of lists names, and that filler and order follow torch's convention."""
    counts, indices = counts[0, 0], indices[0, 0]
    dense = torch.zeros(indices.shape, dtype=torch.bool)
    for row, (count, order) in enumerate(zip(counts.tolist(), indices.tolist(), strict=True)):
        assert sorted(order) == list(range(len(order)))
        assert order[:count] == sorted(order[:count])
        assert order[count:] == sorted(order[count:])
        dense[row, order[:count]] = True
    return dense


def lists_of(batch: PackedBatch, window: int, size: int) -> BlockLists:
    lists = block_lists(batch.position_ids, batch.subtree_end, window, size)
    count = -(-batch.num_slots // size)
    for name, tensor in lists._asdict().items():
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
        assert tensor.shape == ((1, 1, count, count) if name.endswith("indices") else (1, 1, count))
    return lists


@quick
@given(BATCHES, st.sampled_from([1, 2, 5, 16]))
def test_without_a_window_the_lists_are_exact(batch, size):
    lists = lists_of(batch, 0, size)
    some, full = blocks_of(dense_mask(batch, 0), size)
    assert (to_dense(*lists[0:2]) == (some & ~full)).all()
    assert (to_dense(*lists[2:4]) == full).all()


@quick
@given(BATCHES, st.sampled_from([1, 2, 5, 16]), st.integers(1, 40))
def test_with_a_window_no_visible_block_is_left_out_and_no_masked_one_called_full(batch, size, window):
    lists = lists_of(batch, window, size)
    some, full = blocks_of(dense_mask(batch, window), size)
    partial, claimed = to_dense(*lists[0:2]), to_dense(*lists[2:4])
    assert not (partial & claimed).any()
    assert (some <= (partial | claimed)).all()
    assert (claimed <= full).all()


@quick
@given(BATCHES, st.sampled_from([2, 16]), st.integers(0, 40))
def test_lists_by_key_are_the_transposed_lists_by_query(batch, size, window):
    lists = lists_of(batch, window, size)
    assert (to_dense(*lists[4:6]) == to_dense(*lists[0:2]).T).all()
    assert (to_dense(*lists[6:8]) == to_dense(*lists[2:4]).T).all()


@settings(max_examples=25, deadline=None)
@given(BATCHES)
def test_equal_to_torchs_own(batch):
    assume(batch.num_slots > 1)
    end = batch.subtree_end

    def visible(b, h, q, k):
        return (k <= q) & (q < end[k])

    theirs = create_block_mask(visible, None, None, batch.num_slots, batch.num_slots, device="cpu", BLOCK_SIZE=16)
    for name, ours in lists_of(batch, 0, 16)._asdict().items():
        assert torch.equal(ours, getattr(theirs, name)), name


def test_a_window_drops_blocks_of_a_long_prompt():
    batch = pack([(range(256), [range(64), range(64)])])
    lists = lists_of(batch, 32, 32)
    needed = to_dense(*lists[0:2]) | to_dense(*lists[2:4])
    assert needed[8].nonzero().flatten().tolist() == [7, 8], "the first response sees the prompt's end and itself"
    assert needed[10].nonzero().flatten().tolist() == [7, 10], "so does the second, which stands 64 slots further"


def test_the_ragged_last_block_is_never_full():
    batch = pack([(range(33), [[1]])])  # 34 slots: the third block of 16 holds two
    full = to_dense(*lists_of(batch, 0, 16)[2:4])
    assert not full[2].any()
    assert not full[:, 2].any()
    assert full[1].tolist() == [True, False, False]
    alone = pack([(range(16), [[1]])])  # the last block's only slot sees all that exists of its block
    assert not to_dense(*lists_of(alone, 0, 16)[2:4]).any()


# --------------------------------------------------------------------------- in a graph


class Lists(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, position_ids, subtree_end):
        return tuple(self.function(position_ids, subtree_end, 8, 16))


@pytest.mark.parametrize("function", [block_lists, block_lists_op])
def test_exports_with_a_dynamic_length(function):
    length = torch.export.Dim("T", min=17)  # two blocks and more; one block would be a graph of its own
    example, other = pack([(range(50), [range(9), range(20)])]), pack([(range(5), [range(9), range(3)])] * 7)
    program = torch.export.export(
        Lists(function), (example.position_ids, example.subtree_end), dynamic_shapes=({1: length}, {0: length})
    )
    for batch in (example, other):
        found = program.module()(batch.position_ids, batch.subtree_end)
        expected = block_lists(batch.position_ids, batch.subtree_end, 8, 16)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("window", [0, 7])
def test_op_keeps_torchs_rules(window):
    batch = pack([(range(50), [range(9), range(20)])])
    torch.library.opcheck(block_lists_op, (batch.position_ids, batch.subtree_end, window, 16))


# --------------------------------------------------------------------------- invariants


@quick
@given(BATCHES)
def test_every_pack_keeps_the_invariants(batch):
    check_layout(batch.position_ids, batch.subtree_end, batch.segments, num_tokens=batch.num_tokens)


def _layout() -> dict[str, torch.Tensor]:
    batch = pack([([1, 2, 3], [[4, 5], [6]]), ([7], [[8]])], pad_to_multiple_of=5)
    return {
        "position_ids": batch.position_ids,  # 0 1 2 3 4 3 0 1 0 0
        "subtree_end": batch.subtree_end,  # 6 6 6 5 5 6 8 8 10 10
        "segments": batch.segments,  # [0 3 6 -1] [3 5 5 0] [5 6 6 0] [6 7 8 -1] [7 8 8 3] [8 10 10 -1]
    }


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("position_ids", (0, 4), 3, r"position_ids\[4\] is 3, expected 4"),
        ("position_ids", (0, 5), 5, r"position_ids\[5\] is 5, expected 3"),
        ("position_ids", (0, 6), 4, r"position_ids\[6\] is 4, expected 0"),
        ("position_ids", (0, 9), 1, r"position_ids\[9\] is 1, expected 0"),
        ("subtree_end", (3,), 6, r"subtree_end\[3\] is 6, expected 5"),
        ("segments", (1, 1), 4, r"segment 2 covers slots \[5, 6\), expected a non-empty run from 4"),
        ("segments", (0, 0), 1, r"segment 0 covers slots \[1, 3\)"),
        ("segments", (5, 1), 9, "segments cover slots 0..9, the pack has 10"),
        ("segments", (1, 2), 7, r"segment 1 ends its subtree at 7, outside \[5, 6\]"),
        ("segments", (0, 2), 2, r"segment 0 ends its subtree at 2"),
        ("segments", (2, 3), 1, "segment 2 names parent 1, the innermost segment around slot 5 is 0"),
        ("segments", (0, 2), 8, "segment 3 names parent -1, the innermost segment around slot 6 is 0"),
    ],
)
def test_a_broken_layout_is_named(name, index, value, message):
    layout = _layout()
    layout[name] = layout[name].clone()
    layout[name][index] = value
    with pytest.raises(ValueError, match=message):
        check_layout(**layout, num_tokens=8)


def test_padding_must_be_one_root_of_its_own():
    with pytest.raises(ValueError, match=r"padding slots 9..9 must be one root segment"):
        check_layout(**_layout(), num_tokens=9)
    with pytest.raises(ValueError, match=r"position_ids\[9\] is 0, expected 1"):
        check_layout(**_layout())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("position_ids", lambda t: t[0]),
        ("position_ids", lambda t: t.int()),
        ("subtree_end", lambda t: t[None]),
        ("segments", lambda t: t[:, :3]),
        ("segments", lambda t: t.int()),
    ],
)
def test_forms_are_checked(name, change):
    layout = _layout()
    layout[name] = change(layout[name])
    with pytest.raises(ValueError, match="must be int64"):
        check_layout(**layout)
    with pytest.raises(ValueError, match="on the host"):
        check_layout(**{**_layout(), "segments": _layout()["segments"].to("meta")})
