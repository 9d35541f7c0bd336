"""Sequences -> prefix forest in depth-first order (numpy only).

A forest stores each shared beginning once. Written in depth-first order it needs one integer per slot
to say who may see whom: ``j`` is visible to ``i`` iff ``j <= i < subtree_end[j]``. For the sequences
``a b c d``, ``a b x`` and ``z``::

    slot          0  1  2  3  4  5
    token         a  b  c  d  x  z
    position      0  1  2  3  2  0      index in the unpacked sequence
    subtree_end   5  5  4  4  5  6
    segment       0  0  1  1  2  3      parents -1, 0, 0, -1

Shapes: ``T`` slots, ``S`` segments, ``N`` sequences. Work per token is done by numpy; Python loops run over
segments and sequences only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .prefixes import SortedSequences, sort_sequences

__all__ = ["Forest", "forest_from_groups", "forest_from_sequences"]

Ids = NDArray[np.int64]
Tokens = NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class Forest:
    """Token sequences with shared beginnings stored once, in depth-first order.

    Attributes:
        tokens: int64 ``[T]``, the token of each slot.
        positions: int64 ``[T]``, index of the slot's token in every unpacked sequence through it.
        subtree_end: int64 ``[T]``, one past the last slot that descends from this one.
        segments: int64 ``[S, 4]`` in depth-first order: first slot, one past the last slot, ``subtree_end``
            of its slots, parent segment (-1 for a root).
        leaf: int64 ``[N]``, the segment in which each input sequence ends (it may end inside it).
        lengths: int64 ``[N]``, the length of each input sequence.
    """

    tokens: Ids
    positions: Ids
    subtree_end: Ids
    segments: Ids
    leaf: Ids
    lengths: Ids

    @property
    def num_slots(self) -> int:
        """``T``, the tokens that are stored."""
        return len(self.tokens)

    @property
    def num_sequences(self) -> int:
        """``N``, the sequences that went in."""
        return len(self.leaf)

    def slots(self, starts: Ids) -> Ids:
        """Slots of all sequences in input order, each from its token ``starts[n]`` on.

        int64 ``[sum(lengths - starts)]``, ``starts`` int64 ``[N]``.

        Climbs from the leaves to the roots, all sequences at once: as many steps as the forest is deep.
        """
        active = np.flatnonzero(self.lengths > starts)
        segment = self.leaf[active]
        runs: list[tuple[Ids, Ids, Ids]] = []  # sequence, position and slot where a run of slots begins
        while len(active):
            first = self.segments[segment, 0]
            depth = self.positions[first]
            begin = np.maximum(depth, starts[active])
            runs.append((active, begin, first - depth + begin))
            above = self.segments[segment, 3]
            more = (above >= 0) & (depth > starts[active])
            active, segment = active[more], above[more]
        return _expand(runs, starts, self.lengths)

    def sequence(self, n: int) -> Ids:
        """Tokens of sequence ``n``, read back from the forest: int64 ``[lengths[n]]``."""
        starts = self.lengths.copy()
        starts[n] = 0
        return self.tokens[self.slots(starts)]


def forest_from_groups(groups: Iterable[tuple[Tokens, Sequence[Tokens]]]) -> Forest:
    """One segment per prompt, its responses as children.

    Args:
        groups: ``(prompt, responses)`` pairs of integer arrays: one or more responses, none empty. An empty prompt has
            no segment, and its responses are roots. Equal prompts, and equal responses, stay apart; everything keeps
            its input order.

    Returns:
        A forest whose sequences are ``prompt + response``, in input order.
    """
    pieces: list[Tokens] = []
    parent: list[int] = []
    leaf: list[int] = []
    for prompt, responses in groups:
        root = -1
        if len(prompt):
            root = len(pieces)
            pieces.append(prompt)
            parent.append(-1)
        leaf.extend(range(len(pieces), len(pieces) + len(responses)))
        pieces.extend(responses)
        parent.extend([root] * len(responses))
    parents, leaves = np.array(parent, dtype=np.int64), np.array(leaf, dtype=np.int64)
    sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
    depths = np.where(parents >= 0, sizes[parents], 0)
    return _lay_out(pieces, sizes, depths, parents, leaves, (depths + sizes)[leaves])


def forest_from_sequences(flat: Tokens, lengths: Ids) -> Forest:
    """Every common beginning merged, at any depth: a compressed trie of the sequences.

    Siblings stand in the order in which the input first visits them, so the result is a function of the
    input alone. A sequence that is a beginning of another, or equal to another, adds no slots; several
    sequences may end in one slot.

    Args:
        flat: integers, the sequences one after another.
        lengths: int64 ``[N]``, the length of each, none 0.
    """
    trie = _grow_trie(sort_sequences(flat, lengths))
    order = trie.depth_first()
    rank = {node: s for s, node in enumerate(order)}
    rank[-1] = -1
    starts = [trie.start(node) for node in order]
    begin = (np.cumsum(lengths) - lengths).tolist()  # of each sequence in flat
    pieces = []
    for node, start in zip(order, starts, strict=True):
        source = begin[trie.source[node]]
        pieces.append(flat[source + start : source + trie.stop[node]])
    return _lay_out(
        pieces,
        np.fromiter(map(len, pieces), np.int64, len(pieces)),
        np.array(starts, dtype=np.int64),
        np.array([rank[trie.parent[node]] for node in order], dtype=np.int64),
        np.array([rank[node] for node in trie.leaf], dtype=np.int64),
        lengths,
    )


def _expand(runs: list[tuple[Ids, Ids, Ids]], starts: Ids, lengths: Ids) -> Ids:
    """Write out runs of slots, by sequence and by position in it."""
    if not runs:
        return np.empty(0, np.int64)
    sequence, begin, slot = (np.concatenate(column) for column in zip(*runs, strict=True))
    # Where each run begins in the output. Runs come leaves first; one sort puts those of a sequence in their order.
    offset = (np.cumsum(lengths - starts) - lengths + starts)[sequence] + begin - starts[sequence]
    order = np.argsort(offset, kind="stable")  # a merge sort: offsets rise within each step of the climb
    total = int((lengths - starts).sum())
    size = np.diff(offset[order], append=total)
    return np.repeat(slot[order] - offset[order], size) + np.arange(total)


def _lay_out(pieces: list[Tokens], sizes: Ids, depths: Ids, parents: Ids, leaf: Ids, lengths: Ids) -> Forest:
    """Write segments, already in depth-first order, one after another.

    Args:
        pieces: the tokens of each segment.
        sizes, depths, parents: int64 ``[S]``: tokens of each, position of its first token, segment above it.
        leaf, lengths: as in :class:`Forest`.
    """
    stops = np.cumsum(sizes)
    first = stops - sizes
    ends = _subtree_ends(stops.tolist(), parents.tolist())
    return Forest(
        tokens=np.concatenate(pieces, dtype=np.int64),
        positions=np.arange(sizes.sum()) - np.repeat(first - depths, sizes),
        subtree_end=np.repeat(ends, sizes),
        segments=np.stack([first, stops, ends, parents], axis=1),
        leaf=leaf,
        lengths=lengths,
    )


def _subtree_ends(stops: list[int], parents: list[int]) -> Ids:
    ends = list(stops)
    for s in range(len(ends) - 1, -1, -1):  # children stand after their parent, so theirs are final
        parent = parents[s]
        if parent >= 0 and ends[parent] < ends[s]:
            ends[parent] = ends[s]
    return np.array(ends, dtype=np.int64)


# --------------------------------------------------------------------------- the trie


@dataclass
class _Trie:
    """A compressed trie under construction; node ``n`` holds tokens ``start(n):stop[n]`` of a sequence."""

    leaf: list[int]
    parent: list[int] = field(default_factory=list)
    stop: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)

    def add(self, parent: int, stop: int, source: int) -> int:
        self.parent.append(parent)
        self.stop.append(stop)
        self.source.append(source)
        return len(self.parent) - 1

    def start(self, node: int) -> int:
        return self.stop[self.parent[node]] if self.parent[node] >= 0 else 0

    def depth_first(self) -> list[int]:
        """Nodes in depth-first order, siblings by the first sequence through them."""
        child, sibling = self._linked_children()
        order, node = [], child[-1]
        while node >= 0:
            order.append(node)
            below = child[node]
            while below < 0 and node >= 0:
                below, node = sibling[node], self.parent[node]
            node = below
        return order

    def _linked_children(self) -> tuple[list[int], list[int]]:
        """First child of each node (the last entry: the first root) and next sibling of each, -1 for none."""
        count = len(self.parent)
        child, last, sibling = [-1] * (count + 1), [-1] * (count + 1), [-1] * count
        seen = [False] * count
        for node in self.leaf:
            while node >= 0 and not seen[node]:
                seen[node] = True
                parent = self.parent[node]
                if child[parent] < 0:
                    child[parent] = node
                else:
                    sibling[last[parent]] = node
                last[parent] = node
                node = parent
        return child, sibling


def _grow_trie(rows: SortedSequences) -> _Trie:
    """Insert the sequences in their lexicographic order; only the path to the latest one is ever open."""
    lengths = rows.lengths.tolist()
    trie = _Trie(leaf=[-1] * len(lengths))
    path: list[int] = []
    previous = 0  # the length of the previous sequence
    for n, shared in zip(rows.order.tolist(), rows.shared.tolist(), strict=True):
        _close_below(trie, path, shared)
        if path and shared == previous:
            # The previous sequence is a beginning of this one (or equals it), and nothing hangs below its
            # end yet: its segment grows, where a second one would have the same descendants.
            trie.stop[path[-1]], trie.source[path[-1]] = lengths[n], n
        else:
            path.append(trie.add(path[-1] if path else -1, lengths[n], n))
        trie.leaf[n] = path[-1]
        previous = lengths[n]
    _settle_leaves(trie, lengths)
    return trie


def _close_below(trie: _Trie, path: list[int], shared: int) -> None:
    """Cut the open path at depth ``shared``, forking the node in whose middle that falls."""
    while path and trie.stop[path[-1]] > shared:
        node = path.pop()
        above = trie.stop[path[-1]] if path else 0
        if above < shared:
            path.append(trie.add(trie.parent[node], shared, trie.source[node]))
            trie.parent[node] = path[-1]


def _settle_leaves(trie: _Trie, lengths: list[int]) -> None:
    """Where a fork came to stand above the end of a shorter sequence's node, that sequence ends higher up."""
    for n, length in enumerate(lengths):
        while trie.start(trie.leaf[n]) >= length:
            trie.leaf[n] = trie.parent[trie.leaf[n]]
