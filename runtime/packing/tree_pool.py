"""The pool where every common beginning is stored once: also between groups, and between responses.

All sequences are sorted once. A sequence adds to a pack what it does not share with any sequence there, and the
longest beginning that it shares is a running minimum over the sorted order, taken from each new arrival outwards.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..groups import flat_sequences
from ..prefixes import sort_sequences
from .pool import Item, Part, Pool, Work, subsets, triangle

__all__ = ["TreePool"]

Ids = NDArray[np.int64]

_ALL = 1 << 60  # more tokens than any sequence has


class TreePool(Pool):
    """See :class:`.pool.Pool`.

    Its arrays hold sequences item by item, and within an item in lexicographic order: int64 ``[N]``. A *rank* is a
    place in the lexicographic order of all.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        rows = sort_sequences(*flat_sequences(item.record for item in items))
        counts = np.fromiter((item.record.num_sequences for item in items), np.int64, len(items))
        edges = np.concatenate([[0], np.cumsum(counts)])
        rank = np.empty_like(rows.order)
        rank[rows.order] = np.arange(len(rank))
        self._owner = np.repeat(np.arange(len(items)), counts)
        by_item = np.lexsort((rank, self._owner))
        self._starts, self._edges = edges[:-1], edges.tolist()
        self._rank, self._lengths = rank[by_item], rows.lengths[by_item]
        # In sorted order, not item by item: what each sequence shares with the one before it, and where it stands here.
        self._shared, self._place = rows.shared, np.argsort(self._rank)
        # All share a base. Where neighbours share no more than that, those before and those behind never will.
        self._base = int(self._shared[1:].min()) if len(rank) > 1 else 0
        self._families = [*np.flatnonzero(self._shared <= self._base).tolist(), len(rank)]
        self._position = by_item - np.repeat(self._starts, counts)
        # What each sequence shares with the one before it in its own item; 0 for the first.
        self._within_whole = rows.shared[self._rank]
        self._within_whole[self._starts] = 0
        apart = np.flatnonzero(np.diff(self._rank, prepend=0) != 1)  # sequences of others stand between
        for s in np.setdiff1d(apart, self._starts).tolist():
            self._within_whole[s] = self._shared[self._rank[s - 1] + 1 : self._rank[s] + 1].min()
        super().__init__(items)

    def reset(self) -> None:
        """All sequences wait, and no pack is open."""
        super().reset()
        self._here = np.ones(len(self._rank), dtype=bool)  # sequences that wait
        self._within = self._within_whole.copy()  # of those that wait only
        self._known = np.zeros_like(self._lengths)  # what each sequence shares with the open pack
        self.sizes = self._added_by_item()
        self.open()

    def open(self) -> None:
        """Begin a pack: no sequence shares anything with it."""
        self._known.fill(0)
        self._empty = True
        self.needs = self.sizes.copy()

    def sharing_most(self, items: Ids, grain: int) -> Ids:
        """Those of the items that share most with the open pack, ``grain`` tokens more or less."""
        saved = (self.sizes[items] - self.needs[items]) // grain
        return items[saved == saved.max()]

    def _added_by_item(self) -> Ids:
        """Tokens that each item adds to the open pack: int64 ``[I]``."""
        return np.add.reduceat((self._lengths - np.maximum(self._known, self._within)) * self._here, self._starts)

    def _waiting(self, item: int) -> Ids:
        """Where an item's sequences that wait stand in the arrays."""
        start, stop = self._edges[item], self._edges[item + 1]
        return np.arange(start, stop)[self._here[start:stop]]

    def _move(self, item: int, positions: Sequence[int]) -> Work:
        here = self._waiting(item)
        if len(positions) == len(here):  # all that waits
            overlap = np.maximum(self._known[here], self._within[here])
        else:
            here = here[np.isin(self._position[here], positions)]
            overlap = np.maximum(self._known[here], self._shared_in_row(here))
        lengths = self._lengths[here]
        self._here[here] = False
        if self._empty:
            self._known.fill(self._base)
            self.needs = self._added_by_item()
            self._empty = False
        self._meet(self._rank[here])
        return Work(int((lengths - overlap).sum()), int((triangle(lengths) - triangle(overlap)).sum()))

    def _shared_in_row(self, here: Ids) -> Ids:
        """What each of these sequences of one item shares with the one before it; 0 for the first."""
        ranks = self._rank[here].tolist()
        return np.array([0] + [int(self._shared[a + 1 : b + 1].min()) for a, b in itertools.pairwise(ranks)])

    def _meet(self, ranks: Ids) -> None:
        """Let the other sequences know what they share with new ones in the pack, at these ranks, ascending."""
        low, high = int(ranks[0]), int(ranks[-1])
        first = self._families[bisect.bisect_right(self._families, low) - 1]
        stop = self._families[bisect.bisect_right(self._families, high)]
        if stop - first == len(ranks):
            return  # nobody else shares more than the base
        shared, best = self._shared, np.empty(stop - first, np.int64)
        np.minimum.accumulate(shared[low:first:-1], out=best[: low - first][::-1])
        best[low - first : high - first + 1] = _ALL
        np.minimum.accumulate(shared[high + 1 : stop], out=best[high - first + 1 :])
        for gap in np.flatnonzero(np.diff(ranks) != 1).tolist():  # sequences of others stand between
            a, b = int(ranks[gap]), int(ranks[gap + 1])
            left, right = np.minimum.accumulate(shared[a + 1 : b]), np.minimum.accumulate(shared[b : a + 1 : -1])[::-1]
            best[a - first + 1 : b - first] = np.maximum(left, right)
        here = self._place[first:stop]
        before, within = self._known[here], self._within[here]
        known = np.maximum(before, best)  # of the new ones themselves it is never asked again
        self._known[here] = known
        spared = (np.maximum(known, within) - np.maximum(before, within)) * self._here[here]
        np.subtract.at(self.needs, self._owner[here], spared)

    def _shrink(self, item: int) -> None:
        here = self._waiting(item)
        self._within[here] = self._shared_in_row(here)
        self.needs[item] = (self._lengths[here] - np.maximum(self._known[here], self._within[here])).sum()
        self.sizes[item] = (self._lengths[here] - self._within[here]).sum()

    def parts(self, item: int, space: int) -> Iterator[Part]:
        """Neighbours, which share most, from either end; and the largest first, as if they shared least."""
        here = self._waiting(item)
        position = self._position[here].tolist()
        lengths, within, known = (x[here].tolist() for x in (self._lengths, self._within, self._known))
        count = len(position)
        shared_by_all = min(within[1:], default=0)
        floor = [max(k, shared_by_all) for k in known]
        sizes = [length - f for length, f in zip(lengths, floor, strict=True)]
        room = space - max(0, shared_by_all - max(known))
        for chosen in (
            _run(lengths, within, known, space),
            [count - 1 - n for n in _run(lengths[::-1], [0, *within[:0:-1]], known[::-1], space)],
            *subsets(sizes, room),
        ):
            if not 0 < len(chosen) < count:
                continue
            taken = [False] * count
            for n in chosen:
                taken[n] = True
            rest = _trie_tokens(lengths, within, [0] * count, [not t for t in taken])
            added = _trie_tokens(lengths, within, known, taken)
            yield Part([position[n] for n in chosen], added, added + rest - int(self.needs[item]))


def _run(lengths: list[int], within: list[int], known: list[int], space: int) -> list[int]:
    """Sequences in order, as long as they fit: positions."""
    chosen, overlap = [], 0
    for n, length in enumerate(lengths):
        overlap = min(overlap, within[n])
        added = length - max(overlap, known[n])
        if added <= space:
            chosen.append(n)
            space, overlap = space - added, _ALL
    return chosen


def _trie_tokens(lengths: list[int], within: list[int], known: list[int], taken: list[bool]) -> int:
    """Tokens that the taken ones of an item's sequences add to a pack with which they share ``known``."""
    tokens, overlap = 0, 0
    for length, shared, k, take in zip(lengths, within, known, taken, strict=True):
        overlap = min(overlap, shared)
        if take:
            tokens += length - max(overlap, k)
            overlap = _ALL
    return tokens
