"""Groups that wait for a pack, and how many tokens each of them would add to the pack that is open.

With ``share="prompt"`` that is the group's own size. With ``share="tree"`` it depends on what stands in the pack
already: tokens are counted as the pack's trie would store them, exactly, and kept up to date as groups come in.

Shapes: ``I`` items, ``N`` sequences of all items.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..groups import Record

__all__ = ["Item", "Part", "Pool", "Work", "make_pool", "subsets", "triangle"]

Ids = NDArray[np.int64]

_STARTS = 4  # subsets tried when a group is split


class Work(NamedTuple):
    """What a pack costs: its tokens, and its attention pairs (for each token, the tokens that it sees)."""

    tokens: int
    pairs: int

    def plus(self, other: Work) -> Work:
        """Both together."""
        return Work(self.tokens + other.tokens, self.pairs + other.pairs)


class Part(NamedTuple):
    """Some of an item's sequences.

    Attributes:
        positions: which.
        added: tokens that they add to the open pack.
        repeated: how many of these will be stored a second time, in the pack that takes the rest.
    """

    positions: list[int]
    added: int
    repeated: int


@dataclass(frozen=True, eq=False)
class Item:
    """A group, or a part of one, that waits for its pack. Subclasses may carry more; their parts carry it too.

    Attributes:
        record: its sequences.
        index: which of the inputs it is.
        sequences: which sequences of that input.
        weight: its share of the input's weight.
        is_part: some of the input's sequences are elsewhere.
    """

    record: Record
    index: int
    sequences: Sequence[int]
    weight: float
    is_part: bool = field(default=False, kw_only=True)

    @property
    def name(self) -> str:
        """What messages call the group."""
        return f"group {self.index}"

    def part(self, positions: Sequence[int]) -> Item:
        """The item with these of its sequences only, and their share of the weight."""
        if len(positions) == len(self.sequences):
            return self
        return replace(
            self,
            record=self.record.part(positions),
            sequences=tuple(self.sequences[n] for n in positions),
            weight=self.weight * len(positions) / len(self.sequences),
            is_part=True,
        )


class Pool(abc.ABC):
    """Items that wait. Their sequences leave it into one open pack after another.

    Attributes:
        items: as given. A *position* is a place in ``items[i].record.responses``.
        left: for each item, the positions that still wait.
        waiting: bool ``[I]``, whether any do.
        sizes: int64 ``[I]``, tokens of what waits of each item, in a pack of its own.
        needs: int64 ``[I]``, tokens that it would add to the open pack.
    """

    sizes: Ids
    needs: Ids

    left: list[Sequence[int]]
    waiting: NDArray[np.bool_]

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.reset()

    def reset(self) -> None:
        """All sequences wait, and no pack is open."""
        self.left = [range(item.record.num_sequences) for item in self.items]
        self.waiting = np.ones(len(self.items), dtype=bool)

    @abc.abstractmethod
    def open(self) -> None:
        """Begin a pack: nothing is in it."""

    def take(self, item: int, positions: Sequence[int] | None = None) -> Work:
        """Move these sequences of an item (all that wait, by default) into the open pack; what they add to it."""
        left = self.left[item]
        taken = left if positions is None else positions
        work = self._move(item, taken)
        self.left[item] = [] if taken is left else sorted(set(left) - set(taken))
        if self.left[item]:
            self._shrink(item)
        else:
            self.waiting[item] = False
        return work

    @abc.abstractmethod
    def _move(self, item: int, positions: Sequence[int]) -> Work:
        """Put sequences into the open pack."""

    @abc.abstractmethod
    def _shrink(self, item: int) -> None:
        """Measure an item again, some of whose sequences are gone."""

    def sharing_most(self, items: Ids, grain: int) -> Ids:
        """Those of the items that share most with the open pack, ``grain`` tokens more or less; all, if none can."""
        return items

    @abc.abstractmethod
    def parts(self, item: int, space: int) -> Iterator[Part]:
        """Ways to fill at most ``space`` tokens of the open pack with some of an item's sequences, not all."""


def make_pool(items: Sequence[Item], share: str) -> Pool:
    """The pool for ``share``, one of :data:`runtime.batch.SHARE`: the class of this name in a file of its own."""
    module = importlib.import_module(f"{__package__}.{share}_pool")
    pool: Pool = getattr(module, f"{share.capitalize()}Pool")(items)
    return pool


def subsets(sizes: list[int], room: int) -> Iterator[list[int]]:
    """Subsets of at most ``room``: start with each of the largest in turn, then take the next largest that fit."""
    order = sorted(range(len(sizes)), key=lambda n: -sizes[n])
    for first in order[:_STARTS]:
        if sizes[first] > room:
            continue
        chosen, left = [first], room - sizes[first]
        for n in order:
            if n != first and sizes[n] <= left:
                chosen.append(n)
                left -= sizes[n]
        if len(chosen) < len(sizes):
            yield chosen


_T = TypeVar("_T", int, Ids)


def triangle(n: _T) -> _T:
    """1 + 2 + ... + n."""
    return n * (n + 1) // 2
