"""Groups read one after another, and packs filled from a window of them: what keeps memory bounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..groups import as_record
from .fill import Pack, fill_packs
from .oversize import Budget
from .pool import Item
from .report import PackingReport

__all__ = ["fill_windows", "is_indexable", "read_items"]

_MOST_ITEMS = 2048  # groups of a window: choosing among more takes longer and fills no better
_MOST_UNPACKED = 8  # tokens of a window's unpacked sequences, in windows: sorting them all needs the memory


def _in_order(groups: Any, rng: np.random.Generator | None) -> Iterator[tuple[int, Any]]:
    """Entries with their index, shuffled as a whole where they can be indexed."""
    if not is_indexable(groups):
        yield from enumerate(groups)
        return
    for index in range(len(groups)) if rng is None else rng.permutation(len(groups)).tolist():
        yield index, groups[index]


def is_indexable(groups: Any) -> bool:
    """Lists, map-style data sets: what has a length and gives its items by number."""
    return hasattr(groups, "__len__") and hasattr(groups, "__getitem__")


def read_items(
    groups: Any,
    budget: Budget,
    weight: Callable[[Any], float] | None,
    rng: np.random.Generator | None,
    report: PackingReport,
) -> Iterator[Item]:
    """Entries checked, counted, and made to fit.

    Raises:
        ValueError: there are none, as from a generator that was read before.
    """
    for index, entry in _in_order(groups, rng):
        item = entry if isinstance(entry, Item) else _item(entry, index, weight)
        report.groups += 1
        report.sequences += item.record.num_sequences
        yield from budget.fit(item, report)
    if not report.groups:
        raise ValueError("packs() got no groups; a generator can be read once only: make a new one for each epoch")


def _item(entry: Any, index: int, weight: Callable[[Any], float] | None) -> Item:
    record = as_record(entry, f"group {index}")
    count = record.num_sequences
    return Item(record, index, range(count), count if weight is None else _weight(weight, entry, index))


def _weight(weight: Callable[[Any], float], entry: Any, index: int) -> float:
    value = float(weight(entry))
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"weight of group {index} is {value}; accepted: a finite number, 0 or more")
    return value


def fill_windows(items: Iterator[Item], budget: Budget, window: int, rng: np.random.Generator | None) -> Iterator[Pack]:
    """Fill packs from a window that is filled up whenever half of it is gone."""
    waiting: list[Item] = []
    more = True
    while more:
        more = _read_window(items, waiting, window * budget.max_tokens)
        if not waiting:
            return
        made, waiting = fill_packs(
            waiting,
            share=budget.share,
            max_tokens=budget.max_tokens,
            split=budget.split_groups,
            keep=0.5 if more else 0.0,
            rng=rng,
        )
        yield from made


def _read_window(items: Iterator[Item], waiting: list[Item], tokens: int) -> bool:
    """Read on until the window is full; false where nothing is left to read."""
    held = sum(item.record.num_tokens for item in waiting)
    unpacked = sum(item.record.unpacked_tokens for item in waiting)
    while held < tokens and unpacked < _MOST_UNPACKED * tokens and len(waiting) < _MOST_ITEMS:
        item = next(items, None)
        if item is None:
            return False
        waiting.append(item)
        held += item.record.num_tokens
        unpacked += item.record.unpacked_tokens
    return True
