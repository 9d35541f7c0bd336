"""Preference data: files or ``datasets`` in, checked records out, token ids on request.

    data = read_preferences("pairs.jsonl")            # Preferences: a sequence of Preference
    print(data.summary())                             # how many, how many without a preference, what was skipped
    tokens = tokenize(data[0], tokenizer)             # .prompt ids, .responses ids, .pairs
    batch = ppcompile.pack([tokens.entry])            # a Group, or Rollouts where not all of a response is scored

Accepted spellings are listed in :mod:`ppcompile.data.records`. ``ppcompile.PackedDataLoader`` does all of this and
packs; for a ``DataLoader`` of one's own there are :class:`TokenizedDataset`, :class:`PackBatchSampler` and
:class:`PackCollator`.

**Pairs.** ``(winner, loser)`` indices into the responses. With scores, the best response wins against each strictly
worse one (the first of several equally good ones is taken): N responses give at most N - 1 pairs, so that a group
weighs in proportion to its responses and not to their square.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

from ppcompile.data.batches import PackCollator, PreferenceBatch
from ppcompile.data.records import (
    ON_BAD,
    UNSCORED,
    BadRecord,
    OneSchema,
    Preference,
    Prompt,
    one_of,
    preference_from,
)
from ppcompile.data.sampler import PackBatchSampler
from ppcompile.data.sources import Source, raw_records
from ppcompile.data.tokenized import TokenizedDataset
from ppcompile.data.tokens import RecordTokenizer, TokenizedPreference, tokenize

__all__ = [
    "BadRecord",
    "PackBatchSampler",
    "PackCollator",
    "Preference",
    "PreferenceBatch",
    "Preferences",
    "Prompt",
    "RecordTokenizer",
    "TokenizedDataset",
    "TokenizedPreference",
    "read_preferences",
    "tokenize",
]


@dataclass(frozen=True)
class Preferences(Sequence[Preference]):
    """What :func:`read_preferences` returns: the records, and what became of the others.

    Attributes:
        records: every usable record, those without a preference included.
        skipped: the records left out under ``on_bad="skip"``.
    """

    records: tuple[Preference, ...]
    skipped: tuple[BadRecord, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Preference: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Preference]: ...
    def __getitem__(self, index: int | slice) -> Preference | Sequence[Preference]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def undecided(self) -> tuple[Preference, ...]:
        """Records in which no response is strictly preferred to another: no scores, or all equal."""
        return tuple(record for record in self.records if not record.pairs)

    def summary(self) -> str:
        """One line for a log: records, pairs, undecided, skipped (the first with its reason)."""
        pairs = sum(len(record.pairs) for record in self.records)
        text = f"{len(self)} records, {pairs} pairs"
        if self.undecided:
            text += f", {len(self.undecided)} without a preference (first: {self.undecided[0].where})"
        if self.skipped:
            text += f", {len(self.skipped)} skipped (first: {self.skipped[0]})"
        return text


def read_preferences(
    source: Source,
    *,
    split: str | None = None,
    limit: int | None = None,
    on_bad: Literal["error", "skip"] = "error",
    unscored: Literal["undecided", "best-first"] = "undecided",
) -> Preferences:
    """Read preference records and check each of them.

    Args:
        source: a ``.json`` or ``.jsonl`` file, optionally ``.gz``; a ``.parquet``, ``.csv`` or ``.arrow`` file, a
            folder or a hub name, read by ``datasets``; or the records themselves.
        split: the split to take from a folder or a hub name; ``None`` is ``"train"`` there.
        limit: read at most this many records.
        on_bad: ``"error"`` raises at the first bad record, ``"skip"`` collects them in ``.skipped``.
        unscored: what ``responses`` without scores mean: no preference, or listed with the best one first.

    Raises:
        BadRecord: a record with a missing column, a wrong type, empty text, a score that is not a finite number,
            numbers of responses and scores that differ, or another schema than that of the first record.
        FileNotFoundError: ``source`` is spelled like a file that is not there.
        ImportError: ``datasets`` is needed and not installed.
        ValueError: an unknown ``on_bad`` or ``unscored``, a ``limit`` below one, or a ``split`` that is not there.
    """
    one_of("on_bad", on_bad, ON_BAD)
    one_of("unscored", unscored, UNSCORED)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, or None for all records; got {limit}")
    records: list[Preference] = []
    skipped: list[BadRecord] = []
    schema = OneSchema()
    for where, raw in itertools.islice(raw_records(source, split), limit):
        try:
            record = preference_from(raw, where, unscored)
            schema.check(record)
            records.append(record)
        except BadRecord as bad:
            if on_bad == "error":
                raise
            skipped.append(bad)
    return Preferences(tuple(records), tuple(skipped))
