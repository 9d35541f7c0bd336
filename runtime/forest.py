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
from numpy.typing import ArrayLike, NDArray

__all__ = ["Forest", "forest_from_groups", "forest_from_sequences"]

Ids = NDArray[np.int64]


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

    def sequence_slots(self, n: int, start: int = 0) -> Ids:
        """Slots of sequence ``n`` in order, from its token ``start`` on: int64 ``[lengths[n] - start]``."""
        runs: list[Ids] = []
        segment, stop = int(self.leaf[n]), int(self.lengths[n])
        while segment >= 0 and stop > start:
            first, parent = int(self.segments[segment, 0]), int(self.segments[segment, 3])
            depth = int(self.positions[first])
            shift = first - depth
            runs.append(np.arange(shift + max(depth, start), shift + stop, dtype=np.int64))
            segment, stop = parent, depth
        return np.concatenate([np.empty(0, np.int64), *runs[::-1]])

    def sequence(self, n: int) -> Ids:
        """Tokens of sequence ``n``, read back from the forest: int64 ``[lengths[n]]``."""
        return self.tokens[self.sequence_slots(n)]


def forest_from_groups(groups: Iterable[tuple[ArrayLike, Sequence[ArrayLike]]]) -> Forest:
    """One segment per prompt, its responses as children.

    Args:
        groups: ``(prompt, responses)`` pairs of non-empty integer sequences. Equal prompts, and equal
            responses, stay apart; everything keeps its input order.

    Returns:
        A forest whose sequences are ``prompt + response``, in input order.

    Raises:
        ValueError: an empty or non-integer sequence, or a group without responses.
    """
    pieces: list[Ids] = []
    parent: list[int] = []
    leaf: list[int] = []
    lengths: list[int] = []
    for g, (prompt, responses) in enumerate(groups):
        root = len(pieces)
        pieces.append(_as_ids(prompt, f"prompt of group {g}"))
        parent.append(-1)
        for r, response in enumerate(responses):
            leaf.append(len(pieces))
            pieces.append(_as_ids(response, f"response {r} of group {g}"))
            parent.append(root)
            lengths.append(len(pieces[root]) + len(pieces[-1]))
        if len(pieces) == root + 1:
            raise ValueError(f"group {g} has no responses, so nothing would read its prompt")
    return _lay_out(pieces, parent, leaf, lengths)


def forest_from_sequences(sequences: Iterable[ArrayLike]) -> Forest:
    """Every common beginning merged, at any depth: a compressed trie of the sequences.

    Siblings stand in the order in which the input first visits them, so the result is a function of the
    input alone. A sequence that is a beginning of another, or equal to another, adds no slots; several
    sequences may end in one slot.

    Args:
        sequences: non-empty integer sequences.

    Raises:
        ValueError: an empty or non-integer sequence.
    """
    ids = [_as_ids(sequence, f"sequence {n}") for n, sequence in enumerate(sequences)]
    trie = _grow_trie(ids)
    order = trie.depth_first()
    rank = {node: s for s, node in enumerate(order)}
    rank[-1] = -1
    pieces = [ids[trie.source[node]][trie.start(node) : trie.stop[node]] for node in order]
    parent = [rank[trie.parent[node]] for node in order]
    return _lay_out(pieces, parent, [rank[node] for node in trie.leaf], [len(s) for s in ids])


def _as_ids(values: ArrayLike, where: str) -> Ids:
    ids = np.asarray(values)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise ValueError(f"{where}: expected a non-empty row of integers, got shape {ids.shape} of {ids.dtype}")
    return ids.astype(np.int64, copy=False)


def _lay_out(pieces: list[Ids], parent: list[int], leaf: list[int], lengths: list[int]) -> Forest:
    """Write segments, already in depth-first order, one after another."""
    size = [len(piece) for piece in pieces]
    stop = np.cumsum(size, dtype=np.int64).tolist()
    depth = [0] * len(size)
    for s, above in enumerate(parent):
        depth[s] = depth[above] + size[above] if above >= 0 else 0
    end = list(stop)
    for s in range(len(size) - 1, -1, -1):  # children stand after their parent, so theirs are final
        if parent[s] >= 0:
            end[parent[s]] = max(end[parent[s]], end[s])
    sizes, stops, ends = (np.array(x, dtype=np.int64) for x in (size, stop, end))
    first = stops - sizes
    return Forest(
        tokens=np.concatenate([np.empty(0, np.int64), *pieces]),
        positions=np.arange(sizes.sum()) - np.repeat(first - np.array(depth, dtype=np.int64), sizes),
        subtree_end=np.repeat(ends, sizes),
        segments=np.stack([first, stops, ends, np.array(parent, dtype=np.int64)], axis=1),
        leaf=np.array(leaf, dtype=np.int64),
        lengths=np.array(lengths, dtype=np.int64),
    )


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
        below: list[list[int]] = [[] for _ in range(len(self.parent) + 1)]  # the last entry is parent -1's
        seen = [False] * len(self.parent)
        for node in self.leaf:
            while node >= 0 and not seen[node]:
                seen[node] = True
                below[self.parent[node]].append(node)
                node = self.parent[node]
        order, waiting = [], below[-1][::-1]
        while waiting:
            order.append(waiting.pop())
            waiting.extend(reversed(below[order[-1]]))
        return order


def _grow_trie(ids: list[Ids]) -> _Trie:
    """Insert the sequences in a lexicographic order; only the path to the latest one is ever open."""
    trie = _Trie(leaf=[-1] * len(ids))
    path: list[int] = []
    previous = np.empty(0, np.int64)
    for n in _lexicographic(ids):
        shared = _common_prefix(previous, ids[n])
        _close_below(trie, path, shared)
        if path and shared == len(previous):
            # The previous sequence is a beginning of this one (or equals it), and nothing hangs below its
            # end yet: its segment grows, where a second one would have the same descendants.
            trie.stop[path[-1]], trie.source[path[-1]] = len(ids[n]), n
        else:
            path.append(trie.add(path[-1] if path else -1, len(ids[n]), n))
        trie.leaf[n] = path[-1]
        previous = ids[n]
    _settle_leaves(trie, ids)
    return trie


def _close_below(trie: _Trie, path: list[int], shared: int) -> None:
    """Cut the open path at depth ``shared``, forking the node in whose middle that falls."""
    while path and trie.stop[path[-1]] > shared:
        node = path.pop()
        above = trie.stop[path[-1]] if path else 0
        if above < shared:
            path.append(trie.add(trie.parent[node], shared, trie.source[node]))
            trie.parent[node] = path[-1]


def _settle_leaves(trie: _Trie, ids: list[Ids]) -> None:
    """Where a fork came to stand above the end of a shorter sequence's node, that sequence ends higher up."""
    for n, sequence in enumerate(ids):
        while trie.start(trie.leaf[n]) >= len(sequence):
            trie.leaf[n] = trie.parent[trie.leaf[n]]


def _lexicographic(ids: list[Ids]) -> list[int]:
    """A lexicographic order of the sequences, equal ones in input order, a beginning before its continuations."""
    # Bytes compare by memcmp. On int64 that is not the order of the numbers, but it is one order of tokens, and
    # any will do: sequences with a common beginning come to stand together, and siblings are sorted later.
    keys = [sequence.tobytes() for sequence in ids]
    return sorted(range(len(ids)), key=keys.__getitem__)


def _common_prefix(a: Ids, b: Ids) -> int:
    """Length of the longest common beginning."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    k = int(differs.argmax()) if n else 0
    return k if n and differs[k] else n
