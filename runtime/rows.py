"""Packs -> rows of whole sequences, for modules that must see their tokens in order.

A module that mixes tokens otherwise than by attention (a state-space layer, a convolution) cannot skip over the
responses that stand between a prompt and its second response. It runs on rows in which every sequence stands whole:

    pack    a b c d x z           slots 0 .. 5, the forest of runtime/forest.py
    rows    a b c d               rows[0] = 0 1 2 3
            a b x .               rows[1] = 0 1 4 4    filled up with the last slot, which no one reads
            z . . .               rows[2] = 5 5 5 5
    copies  0 1 2 3 6 8           where each slot stands in the flattened rows, the first copy of it

Shapes: ``T`` slots, ``B`` rows, ``L`` length of the longest row, ``S`` segments. Work per token is done by numpy.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["repack", "unpack", "unpacked_rows"]

Ids = NDArray[np.int64]


def unpacked_rows(segments: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """One row for every sequence that is not the beginning of another.

    Args:
        segments: int64 ``[S, 4]`` on the host, see :class:`runtime.ops.Layout`.
        position_ids: int64 ``[1, T]``.

    Returns:
        ``rows`` int64 ``[B, L]``, the slot of each token, and ``copies`` int64 ``[T]``, the index of the first copy of
        each slot in ``rows.flatten()``. Padding slots stand in no row; their copy is index 0. Both are on the device
        of ``position_ids``.
    """
    position = position_ids[0].cpu().numpy()
    first, stop, end, parent = (np.ascontiguousarray(column) for column in segments.numpy().T)
    real = ~_is_padding(first, stop, parent, position)
    leaves = np.flatnonzero((stop == end) & real)
    slots = [_row(int(leaf), first, stop, parent) for leaf in leaves]
    longest = max(map(len, slots))
    rows = np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in slots])
    # In depth-first order the first leaf below a segment is the first one from it on.
    row_of_segment = np.searchsorted(leaves, np.arange(len(first)))
    copies = np.repeat(row_of_segment * longest, stop - first) + position
    copies[np.repeat(~real, stop - first)] = 0
    return torch.from_numpy(rows).to(position_ids.device), torch.from_numpy(copies).to(position_ids.device)


def _is_padding(first: Ids, stop: Ids, parent: Ids, position: Ids) -> NDArray[np.bool_]:
    """Padding is a root segment whose slots all have position 0; a single slot of it passes for a sequence."""
    second = position[np.minimum(first + 1, len(position) - 1)]
    return (parent < 0) & (stop - first > 1) & (second == 0)


def _row(segment: int, first: Ids, stop: Ids, parent: Ids) -> Ids:
    runs = []
    while segment >= 0:
        runs.append(np.arange(first[segment], stop[segment], dtype=np.int64))
        segment = int(parent[segment])
    return np.concatenate(runs[::-1])


def unpack(x: Tensor, rows: Tensor, token_axis: int, batch_axis: int) -> Tensor:
    """``x`` with T packed tokens in a batch of one -> the same tensor with L tokens in a batch of B.

    Args:
        x: size T at ``token_axis`` and 1 at ``batch_axis``.
        rows: int64 ``[B, L]``.
        token_axis, batch_axis: axes of ``x``, counted from the front.
    """
    taken = x.index_select(token_axis, rows.flatten()).unflatten(token_axis, rows.shape)
    # The axis of rows now stands in front of the tokens; it takes the place of the batch of one.
    behind = batch_axis + (batch_axis > token_axis)
    return taken.transpose(token_axis, behind).squeeze(token_axis)


def repack(y: Tensor, copies: Tensor, token_axis: int, batch_axis: int) -> Tensor:
    """The inverse of :func:`unpack` on the first copy of every slot: T tokens in a batch of one again."""
    in_front = y.movedim(batch_axis, 0).movedim(token_axis if token_axis > batch_axis else token_axis + 1, 1)
    taken = in_front.flatten(0, 1).index_select(0, copies)[None]
    return taken.movedim(1, token_axis if token_axis > batch_axis else token_axis + 1).movedim(0, batch_axis)
