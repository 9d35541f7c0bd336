"""Layout tensors: their block lists for FlexAttention, and the invariants they must keep.

Block lists say which ``block_size`` x ``block_size`` tiles of the mask an attention kernel has to visit.
They follow from ``subtree_end`` by interval arithmetic per block: nothing here is ``[T, T]``.

Shapes: ``T`` slots, ``B`` slots per block, ``N = ceil(T / B)`` blocks, ``S`` segments. ``q`` and ``k`` in a
name's suffix are query and key blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["BLOCK_SIZE", "BlockLists", "block_lists", "block_lists_op", "check_layout"]

BLOCK_SIZE = 128
"""FlexAttention's default tile."""


class BlockLists(NamedTuple):
    """The tensors of a :class:`torch.nn.attention.flex_attention.BlockMask`, in its own convention.

    Counts are int32 ``[1, 1, N]``, indices int32 ``[1, 1, N, N]``: of each row the first ``count`` entries
    are the wanted blocks in ascending order, the rest is filler. ``kv_*`` lists key blocks per query block and
    ``q_*`` query blocks per key block; ``full_*`` are blocks that need no mask, the others need one.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


def block_lists(position_ids: Tensor, subtree_end: Tensor, window: int, block_size: int = BLOCK_SIZE) -> BlockLists:
    """Block lists of a pack's visibility mask.

    Without a window they are exactly those of ``create_block_mask``. With one, a block that holds nothing
    visible may be listed, and a full block may be listed as partial; the mask is applied there, so both
    cost time and change no number.

    Args:
        position_ids: int64 ``[1, T]`` (or ``[T]``).
        subtree_end: int64 ``[T]``.
        window: a key is seen only where ``q - k < window`` in logical positions; 0 for no window.
        block_size: ``B``.

    Every step is a torch op on ``[N, B]`` or ``[N, N]``: runs on any device, and under fake tensors with
    a symbolic ``T``. The one thing a trace then assumes is ``N > 1`` (torch treats sizes 0 and 1 apart), so packs of a
    single block are compiled for themselves.
    """
    some_qk, full_qk = _needed_blocks(position_ids.reshape(-1), subtree_end, window, block_size)
    partial_qk = some_qk & ~full_qk
    by_query = (*_ordered(partial_qk), *_ordered(full_qk))
    by_key = (*_ordered(partial_qk.transpose(0, 1)), *_ordered(full_qk.transpose(0, 1)))
    return BlockLists(*by_query, *by_key)


def _needed_blocks(position: Tensor, end: Tensor, window: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Blocks that may hold something visible, and blocks in which all is visible: bool ``[N, N]`` each."""
    length = end.shape[0]
    count = (length + block_size - 1) // block_size
    # Slots beyond T repeat the last one, which leaves every extremum as it is. No block they stand in is called
    # full, as query or as key: that takes an end beyond T. (FlexAttention applies no mask in a full block, and
    # torch's own lists leave these out too.)
    real = torch.arange(count * block_size, device=end.device).clamp(max=length - 1)
    end_NB = end[real].view(count, block_size)

    block = torch.arange(count, device=end.device)
    query, key = block[:, None], block[None, :]
    some = (key <= query) & (end_NB.amax(1)[None, :] > query * block_size)
    full = ((key + 1) * block_size - 1 <= query * block_size) & (end_NB.amin(1)[None, :] >= (query + 1) * block_size)
    if window:
        pos_NB = position[real].view(count, block_size)
        low, high = pos_NB.amin(1), pos_NB.amax(1)
        some = some & (low[:, None] - high[None, :] < window)
        full = full & (high[:, None] - low[None, :] < window)
    return some, full


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Dense ``[N, N]`` to counts ``[1, 1, N]`` and indices ``[1, 1, N, N]``, wanted blocks first.

    What a stable sort by "wanted" gives, without sorting: each block's place in its row follows from how many wanted
    ones stand before it.
    """
    wanted = dense.contiguous().to(torch.int32)  # contiguous first: a symbolic N then needs no guard on strides
    upto = wanted.cumsum(-1, dtype=torch.int32)
    count = upto[:, -1:]
    block = torch.arange(dense.shape[1], dtype=torch.int32, device=dense.device).expand_as(upto)
    behind = count + block - upto  # the place of a block that is not wanted
    place = behind + wanted * (upto - 1 - behind)
    indices = torch.empty_like(place).scatter_(1, place.long(), block)
    return count[:, 0][None, None].contiguous(), indices[None, None]


@torch.library.custom_op("ppcompile::block_lists", mutates_args=())
def block_lists_op(
    position_ids: Tensor, subtree_end: Tensor, window: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`block_lists` as one node of a graph, so that all sites with the same window share it."""
    return (*block_lists(position_ids, subtree_end, window, block_size),)


@block_lists_op.register_fake
def _(position_ids, subtree_end, window, block_size):  # type: ignore[no-untyped-def]
    count = (subtree_end.shape[0] + block_size - 1) // block_size

    def pair() -> list[Tensor]:
        shapes = ((1, 1, count), (1, 1, count, count))
        return [subtree_end.new_empty(shape, dtype=torch.int32) for shape in shapes]

    return tuple(pair() + pair() + pair() + pair())


# --------------------------------------------------------------------------- invariants


def check_layout(position_ids: Tensor, subtree_end: Tensor, segments: Tensor, *, num_tokens: int | None = None) -> None:
    """Check everything that backends take for granted about the layout tensors of a pack.

    1. ``position_ids`` int64 ``[1, T]``, ``subtree_end`` int64 ``[T]``, ``segments`` int64 ``[S, 4]`` on the host.
    2. Segments tile the slots ``0..T`` in order, none empty.
    3. Intervals ``[first, subtree_end)`` nest, and the parent of a segment is the innermost one around it.
    4. ``subtree_end`` repeats each segment's over its slots.
    5. A position is its predecessor's plus one, and 0 where a root begins.
    6. Slots from ``num_tokens`` on are padding: one root segment, all positions 0.

    Raises:
        ValueError: naming the first invariant that fails, where, and what was found.
    """
    _check_form("position_ids", position_ids, (1, subtree_end.numel()))
    _check_form("subtree_end", subtree_end, (subtree_end.numel(),))
    _check_form("segments", segments, (segments.shape[0] if segments.dim() else 0, 4))
    if segments.device.type != "cpu":
        raise ValueError(f"segments must stay on the host, found them on {segments.device}")
    position, end, rows = position_ids[0].cpu().numpy(), subtree_end.cpu().numpy(), segments.numpy()
    tokens = len(end) if num_tokens is None else num_tokens
    _check_tiling(rows, len(end))
    _check_nesting(rows, len(end))
    _check_slots("subtree_end", end, np.repeat(rows[:, 2], rows[:, 1] - rows[:, 0]))
    _check_slots("position_ids", position, _expected_positions(rows, position, tokens))
    if tokens < len(end) and rows[-1].tolist() != [tokens, len(end), len(end), -1]:
        raise ValueError(
            f"padding slots {tokens}..{len(end) - 1} must be one root segment "
            f"[{tokens}, {len(end)}, {len(end)}, -1] at the end, found {rows[-1].tolist()}"
        )


def _check_form(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.int64 or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be int64 {list(shape)}, found {tensor.dtype} {list(tensor.shape)}")


def _check_tiling(rows: np.ndarray, length: int) -> None:
    edges = np.concatenate([[0], rows[:, 1]])
    bad = np.flatnonzero((rows[:, 0] != edges[:-1]) | (rows[:, 1] <= rows[:, 0]))
    if bad.size:
        s = int(bad[0])
        raise ValueError(
            f"segment {s} covers slots [{rows[s, 0]}, {rows[s, 1]}), expected a non-empty run from {edges[s]}"
        )
    if edges[-1] != length:
        raise ValueError(f"segments cover slots 0..{edges[-1]}, the pack has {length}")


def _check_nesting(rows: np.ndarray, length: int) -> None:
    around: list[int] = []
    for s, (first, stop, end, parent) in enumerate(rows.tolist()):
        while around and rows[around[-1], 2] <= first:
            around.pop()
        above = around[-1] if around else -1
        limit = int(rows[above, 2]) if around else length
        if not stop <= end <= limit:
            raise ValueError(f"segment {s} ends its subtree at {end}, outside [{stop}, {limit}] that its parent allows")
        if parent != above:
            raise ValueError(f"segment {s} names parent {parent}, the innermost segment around slot {first} is {above}")
        around.append(s)


def _check_slots(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    bad = np.flatnonzero(found != expected)
    if bad.size:
        slot = int(bad[0])
        raise ValueError(f"{name}[{slot}] is {found[slot]}, expected {expected[slot]} from the segments")


def _expected_positions(rows: np.ndarray, position: np.ndarray, tokens: int) -> np.ndarray:
    """Each slot's predecessor's position plus one, as found: the first wrong slot is then the one at fault."""
    expected = np.concatenate([[0], position[:-1] + 1])[: len(position)]
    first, parent = rows[:, 0], rows[:, 3]
    expected[first] = np.where(parent >= 0, position[rows[parent, 1] - 1] + 1, 0)
    expected[tokens:] = 0
    return expected
