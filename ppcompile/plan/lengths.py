"""What lengths alone tell, measured: distributions, unique tokens, padding of the usual layout.

Shapes: ``G`` records, ``N`` sequences (a prompt and one of its responses) of all records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ppcompile.runtime.groups import Record, flat_sequences
from ppcompile.runtime.prefixes import sort_sequences

__all__ = ["Distribution", "Lengths", "Padded", "Sharing", "distributions", "padded", "sharing"]

Ids = NDArray[np.int64]

MOST_BINS = 20
WIDE = 8  # from this ratio of the largest to the smallest value on, bins grow


# --------------------------------------------------------------------------- lengths


@dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of the parts of each record.

    Attributes:
        prompts: int64 ``[G]``, what all responses of a record follow (of rollouts: the beginning they share).
        responses: int64 ``[N]``, record by record.
        counts: int64 ``[G]``, responses of each record.
    """

    prompts: Ids
    responses: Ids
    counts: Ids

    @classmethod
    def of(cls, records: Sequence[Record]) -> Lengths:
        """Measure checked records."""
        return cls(
            np.array([len(record.prompt) for record in records], dtype=np.int64),
            np.array([len(ids) for record in records for ids in record.responses], dtype=np.int64),
            np.array([record.num_sequences for record in records], dtype=np.int64),
        )

    @property
    def sequences(self) -> Ids:
        """int64 ``[N]``, prompt and response."""
        return np.repeat(self.prompts, self.counts) + self.responses

    @property
    def longest(self) -> Ids:
        """int64 ``[G]``, the longest sequence of each record."""
        return np.maximum.reduceat(self.sequences, self._starts)

    @property
    def packed(self) -> Ids:
        """int64 ``[G]``, each record with its prompt stored once."""
        return self.prompts + np.add.reduceat(self.responses, self._starts)

    @property
    def unpacked(self) -> Ids:
        """int64 ``[G]``, each record as whole sequences."""
        return np.add.reduceat(self.sequences, self._starts)

    @property
    def _starts(self) -> Ids:
        return np.cumsum(self.counts) - self.counts


# --------------------------------------------------------------------------- distributions


@dataclass(frozen=True)
class Distribution:
    """A few numbers and a histogram of many.

    Attributes:
        title: what is measured, in tokens unless it says otherwise.
        least, median, mean, p95, most: of the values; ``p95`` is above 95% of them.
        edges: ascending, of the bins; value ``v`` is in bin ``n`` if ``edges[n] <= v < edges[n + 1]`` (the last bin
            holds its upper edge too).
        counts: values in each bin, ``len(edges) - 1``.
    """

    title: str
    least: float
    median: float
    mean: float
    p95: float
    most: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, title: str, values: NDArray, edges: NDArray) -> Distribution:
        """Describe values, none of which lies outside the edges."""
        counts, _ = np.histogram(values, edges)
        median, p95 = np.percentile(values, (50, 95)).tolist()
        least, mean, most = float(values.min()), float(values.mean()), float(values.max())
        return cls(title, least, median, mean, p95, most, tuple(edges.tolist()), tuple(counts.tolist()))


def distributions(lengths: Lengths, between_records: Ids) -> list[Distribution]:
    """All that are shown: of prompts, responses, sequences and records, and of what records share.

    Args:
        lengths: of all records.
        between_records: from :func:`sharing`.
    """
    repeated = lengths.prompts * (lengths.counts - 1) / lengths.unpacked
    counted = [
        ("prompt", lengths.prompts),
        ("response", lengths.responses),
        ("sequence", lengths.sequences),
        ("record, prompt once", lengths.packed),
        ("shared with another record", between_records),
        ("responses of a record (number)", lengths.counts),
    ]
    return [
        *(Distribution.of(title, values, _bins(values)) for title, values in counted),
        Distribution.of("repeated prompt (share)", repeated, np.linspace(0, 1, 21)),
    ]


def _bins(values: Ids) -> NDArray[np.float64]:
    """Edges of bins around whole numbers, as the spread of the values asks for.

    Far apart: bins that grow by the square root of two, and one for zero. Close together: at most ``MOST_BINS`` bins of
    one width.
    """
    least, most = int(values.min()), int(values.max())
    if most < WIDE * max(1, least):
        width = -(-(most + 1 - least) // MOST_BINS)
        return np.arange(least, most + 1 + width, width, dtype=np.float64)
    powers = np.unique(np.rint(2 ** (np.arange(2 * np.ceil(np.log2(most + 1)) + 1) / 2)))
    first = np.searchsorted(powers, max(1, least), side="right") - 1
    last = np.searchsorted(powers, most, side="right")
    return np.concatenate([[0.0] if least == 0 else [], powers[first : last + 1]])


# --------------------------------------------------------------------------- sharing


@dataclass(frozen=True)
class Sharing:
    """Tokens of the whole set, by what is stored once.

    Attributes:
        unpacked: nothing; every sequence with its own prompt.
        prompt_once: each record's prompt (``share="prompt"``).
        record_trie: every common beginning inside a record.
        set_trie: every common beginning in the set: what ``share="tree"`` would reach with one pack for everything.
    """

    unpacked: int
    prompt_once: int
    record_trie: int
    set_trie: int

    def reduction(self, kind: str) -> float:
        """How many times fewer tokens than unpacked one of the four is."""
        stored: int = getattr(self, kind)
        return self.unpacked / stored


def sharing(records: Sequence[Record]) -> tuple[Sharing, Ids]:
    """Count unique tokens.

    Returns:
        The counts; and int64 ``[G]``, the longest beginning that each record's first sequence shares with that of
        another record.
    """
    flat, lengths = flat_sequences(records)
    unpacked = int(lengths.sum())
    # A number of its own in front of each record's sequences keeps records apart: one sort for all their tries.
    owner = np.repeat(np.arange(len(records), dtype=flat.dtype), [record.num_sequences for record in records])
    apart = np.insert(flat, np.cumsum(lengths) - lengths, owner)
    counts = Sharing(
        unpacked=unpacked,
        prompt_once=sum(record.num_tokens for record in records),
        record_trie=sort_sequences(apart, lengths + 1).num_tokens - len(records),
        set_trie=sort_sequences(flat, lengths).num_tokens,
    )
    return counts, _between_records(records)


def _between_records(records: Sequence[Record]) -> Ids:
    rows = sort_sequences(*flat_sequences([record.part([0]) for record in records]))
    behind = np.append(rows.shared[1:], 0)
    longest = np.empty_like(behind)
    longest[rows.order] = np.maximum(rows.shared, behind)
    return longest


# --------------------------------------------------------------------------- padding


@dataclass(frozen=True)
class Padded:
    """An epoch of the usual layout: all responses of a few records as rows, padded to the longest of the batch.

    (Chosen rows stand in front of rejected rows; the order of rows changes none of these numbers.)

    Attributes:
        batch_size: records of a batch.
        by_length: records were sorted by their longest sequence first.
        steps: batches of the epoch; the last may be smaller.
        slots: tokens that are computed, padding included.
        padding: slots that hold none.
        pairs: a slot and one up to it, in its row: what causal attention works on.
        largest: slots of the largest batch.
    """

    batch_size: int
    by_length: bool
    steps: int
    slots: int
    padding: int
    pairs: int
    largest: int

    @property
    def waste(self) -> float:
        """Share of the slots that hold nothing."""
        return self.padding / self.slots


def padded(lengths: Lengths, batch_size: int, by_length: bool) -> Padded:
    """Pad batches of records, in the order in which they come or sorted."""
    order = np.argsort(lengths.longest, kind="stable") if by_length else np.arange(len(lengths.counts))
    starts = np.arange(0, len(order), batch_size)
    width = np.maximum.reduceat(lengths.longest[order], starts)
    rows = np.add.reduceat(lengths.counts[order], starts)
    slots = int((rows * width).sum())
    return Padded(
        batch_size=batch_size,
        by_length=by_length,
        steps=len(starts),
        slots=slots,
        padding=slots - int(lengths.unpacked.sum()),
        pairs=int((rows * width * (width + 1) // 2).sum()),
        largest=int((rows * width).max()),
    )
