"""Which groups go into a pack together: best fit, one pack at a time.

A pack takes, again and again, the group that shares most with what it holds already, and among those the largest.
(With ``share="prompt"`` none share, and this is best-fit decreasing.) Two things make packs full: near the end the
*pair* of groups is taken that leaves the least room, and where groups may be split, a part of one tops the pack up.

Sizes are jittered, by the seed and epoch of the caller, so that each epoch packs other groups together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .pool import Item, Pool, Work, make_pool

__all__ = ["Pack", "fill_packs", "pack_of"]

Ids = NDArray[np.int64]

_Choice = tuple[int, list[int] | None]
"""An item, and which of its sequences; ``None`` for all that wait."""

_JITTER = 0.7  # a group counts as up to this much smaller when packs choose the largest
_GRAINS = 128  # shared tokens are compared in this many steps of a budget: a few more are not worth a bad fit
_CLOSING = 3.5  # choose the last groups by fit alone once this many of average size would fill the pack
_WORTH = 1 / 32  # split a group where more than this share of a pack would stay empty
_CANDIDATES = 24  # groups looked at when one is to be split
_FEW_ITEMS, _MOST_TRIES, _FULL = 384, 32, 0.97  # tries with few items, until all packs are full


@dataclass
class Pack:
    """Items that go together, and what they cost together."""

    items: list[Item] = field(default_factory=list)
    work: Work = field(default=Work(0, 0))


def fill_packs(
    items: Sequence[Item], *, share: str, max_tokens: int, split: bool, keep: float, rng: np.random.Generator | None
) -> tuple[list[Pack], list[Item]]:
    """Fill packs from items, none of which is beyond the budget unless it may be split.

    A handful of items makes a handful of packs, where one unlucky choice shows: where those are not full, they are
    filled again with other jitter, and the best of several tries is kept.

    Args:
        items: what waits.
        share: ``"prompt"`` or ``"tree"``.
        max_tokens: budget of a pack.
        split: sequences of one item may go to different packs.
        keep: stop when no more than this share of the tokens waits.
        rng: of the jitter; ``None`` for none.

    Returns:
        The packs, and the items that still wait.
    """
    pool = make_pool(items, share)
    best = _fill(pool, max_tokens, split, keep, rng)
    for _ in range(1, 1 if rng is None else min(_MOST_TRIES, _FEW_ITEMS // len(items))):
        if _is_good(best[0], max_tokens):
            break
        pool.reset()
        other = _fill(pool, max_tokens, split, keep, rng)
        best = min(best, other, key=lambda result: _slots_per_token(result[0], max_tokens))
    return best


def pack_of(items: Sequence[Item], share: str) -> Pack:
    """A pack of these items, which fit."""
    pool, pack = make_pool(items, share), Pack(list(items))
    for n in range(len(items)):
        pack.work = pack.work.plus(pool.take(n))
    return pack


def _fill(
    pool: Pool, max_tokens: int, split: bool, keep: float, rng: np.random.Generator | None
) -> tuple[list[Pack], list[Item]]:
    filler = _Filler(pool, max_tokens, split, rng)
    packs, stop = [], keep * filler.tokens_waiting()
    while filler.tokens_waiting() > stop:
        packs.append(filler.fill())
    return packs, [item.part(left) for item, left in zip(pool.items, pool.left, strict=True) if left]


def _is_good(packs: Sequence[Pack], max_tokens: int) -> bool:
    """All but the last are full, and no group had to be split for that."""
    full = all(pack.work.tokens >= _FULL * max_tokens for pack in packs[:-1])
    return full and len({item.index for pack in packs for item in pack.items}) == sum(len(p.items) for p in packs)


def _slots_per_token(packs: Sequence[Pack], max_tokens: int) -> float:
    """What packs take up, the last one only as far as it is filled, for each token of their unpacked sequences."""
    unpacked = sum(item.record.unpacked_tokens for pack in packs for item in pack.items)
    return ((len(packs) - 1) * max_tokens + packs[-1].work.tokens) / unpacked


class _Filler:
    def __init__(self, pool: Pool, max_tokens: int, split: bool, rng: np.random.Generator | None) -> None:
        self.pool, self.max_tokens, self.split = pool, max_tokens, split
        self.rng = np.random.default_rng(0) if rng is None else rng
        jitter = 0.0 if rng is None else _JITTER
        self.scale = self.rng.uniform(1 - jitter, 1, len(pool.items))

    def tokens_waiting(self) -> int:
        return int(self.pool.sizes[self.pool.waiting].sum())

    def fill(self) -> Pack:
        """One pack, never an empty one."""
        self.pool.open()
        pack = Pack()
        while choices := self._choose(pack):
            for item, chosen in choices:
                positions = self.pool.left[item] if chosen is None else chosen
                pack.items.append(self.pool.items[item].part(positions))
                pack.work = pack.work.plus(self.pool.take(item, positions))
        if not pack.items or pack.work.tokens > self.max_tokens:
            raise AssertionError(f"a pack of {pack.work.tokens} tokens at a budget of {self.max_tokens}")
        return pack

    def _choose(self, pack: Pack) -> list[_Choice]:
        """The next item of the pack, or sequences of one, or all that fit together; nothing where the pack is full."""
        pool, space = self.pool, self.max_tokens - pack.work.tokens
        if self.split and not pack.items:
            beyond = np.flatnonzero(pool.waiting & (pool.sizes > self.max_tokens))
            if len(beyond):
                return self._best_part(beyond[:1], space, least_gain=-space)
        fits = np.flatnonzero(pool.waiting & (pool.needs <= space))
        needed = int(pool.needs[fits].sum())
        if len(fits) and needed <= space:
            return [(n, None) for n in fits.tolist()]  # in whatever order: none will need more for another
        best = pool.sharing_most(fits, max(1, self.max_tokens // _GRAINS)) if len(fits) else fits
        if len(fits) and (not pack.items or space * len(fits) > _CLOSING * needed):
            return [(int(best[np.argmax(pool.sizes[best] * self.scale[best])]), None)]
        n, filled, alone = _best_fit(pool.needs[best], space) if len(best) else (-1, 0, True)
        if self.split and alone and space - filled > self.max_tokens * _WORTH:
            others = self.rng.permutation(np.flatnonzero(pool.waiting))[:_CANDIDATES]
            part = self._best_part(others, space, least_gain=max(filled, int(self.max_tokens * _WORTH / 2)))
            if part:
                return part
        return [(int(best[n]), None)] if n >= 0 else []

    def _best_part(self, items: Ids, space: int, least_gain: int) -> list[_Choice]:
        """The part, if any, that fills most of ``space``, less what will be stored a second time with the rest."""
        best: list[_Choice] = []
        for item in items.tolist():
            for part in self.pool.parts(item, space):
                if part.added - part.repeated > least_gain:
                    best, least_gain = [(item, part.positions)], part.added - part.repeated
        return best


def _best_fit(needs: Ids, space: int) -> tuple[int, int, bool]:
    """Of the items, and of all pairs of them, what leaves the least room.

    Returns:
        The (larger) item, the tokens filled, and whether the item is alone.
    """
    order = np.argsort(needs, kind="stable")
    ascending = needs[order]
    partner = np.minimum(np.searchsorted(ascending, space - ascending, side="right"), np.arange(len(order))) - 1
    filled = ascending + np.where(partner >= 0, ascending[partner], 0)
    n = int(filled.argmax())
    return int(order[n]), int(filled[n]), bool(partner[n] < 0)
