"""Common beginnings of many token sequences, by sorting: the arithmetic under forests and packing.

In lexicographic order, sequences with a common beginning stand together, and the beginning that two of them share
is the least of those that neighbours between them share. So one number a sequence says everything::

    order   sequence   shared with the one above
    0       a b c d    0
    1       a b x      2
    2       a b x y    3
    3       z          0

    tokens of the trie = sum(lengths) - sum(shared) = 12 - 5 = 7

Shapes: ``N`` sequences, ``F`` their tokens in all. No Python loop runs over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["SortedSequences", "common_prefix", "sort_sequences"]

Ids = NDArray[np.int64]

_FIRST_LOOK, _LAST_LOOK, _AT_ONCE = 16, 1024, 1 << 21


@dataclass(frozen=True, eq=False)
class SortedSequences:
    """A lexicographic order of sequences, and what neighbours in it share.

    Attributes:
        order: int64 ``[N]``, sequences in lexicographic order; equal ones in input order, a beginning before its
            continuations.
        shared: int64 ``[N]``, length of the beginning that entry ``n`` of the order shares with entry ``n - 1``;
            0 for the first.
        lengths: int64 ``[N]``, the length of each sequence, in input order.
    """

    order: Ids
    shared: Ids
    lengths: Ids

    @property
    def num_tokens(self) -> int:
        """Tokens of the trie: every common beginning counted once."""
        return int(self.lengths.sum() - self.shared.sum())


def sort_sequences(flat: NDArray, lengths: Ids) -> SortedSequences:
    """Sort sequences and measure what neighbours share.

    Args:
        flat: integers ``[F]``, the sequences one after another; fewer bytes an entry are faster.
        lengths: int64 ``[N]``, the length of each, none 0.
    """
    stops = np.cumsum(lengths)
    starts = stops - lengths
    # Bytes compare by memcmp. On integers that is not the order of the numbers, but it is one order of tokens, and
    # any will do: sequences with a common beginning come to stand together.
    keys = [flat[a:b].tobytes() for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    return SortedSequences(order, _shared_with_previous(flat, starts[order], lengths[order]), lengths)


def _shared_with_previous(flat: NDArray, starts: Ids, lengths: Ids) -> Ids:
    """Common beginning of each row and the one before it, all pairs at once: int64 ``[N]``.

    Looks at ever longer pieces of the pairs that are still equal, so that it reads at most about twice what is
    shared, and not what follows.
    """
    shared = np.zeros(len(starts), np.int64)
    limit = np.zeros_like(shared)
    limit[1:] = np.minimum(lengths[1:], lengths[:-1])
    padded = np.concatenate([flat, np.zeros(_LAST_LOOK, flat.dtype)])  # a look may reach beyond the last row
    pairs, look = np.flatnonzero(limit), _FIRST_LOOK
    while len(pairs):
        pieces = np.lib.stride_tricks.sliding_window_view(padded, look)
        known = shared[pairs]
        differs = pieces[starts[pairs] + known] != pieces[starts[pairs - 1] + known]
        first = differs.argmax(axis=1)
        equal = ~differs[np.arange(len(pairs)), first]
        known += np.where(equal, look, first)
        shared[pairs] = np.minimum(known, limit[pairs])
        pairs = pairs[equal & (known < limit[pairs])]
        look = min(2 * look, _LAST_LOOK, max(_FIRST_LOOK, _AT_ONCE // max(1, len(pairs))))
    return shared


def common_prefix(a: NDArray, b: NDArray) -> int:
    """Length of the longest common beginning of two sequences."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    k = int(differs.argmax()) if n else 0
    return k if n and differs[k] else n
