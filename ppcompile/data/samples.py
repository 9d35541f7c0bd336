"""What a loader packs: one record as checked token ids, with what a loss needs to know of it.

A data set may hold raw records in any spelling (``ppcompile.data.records``), :class:`Preference` or
:class:`TokenizedPreference` objects, what ``ppcompile.pack`` takes (groups, rollouts, lists of rollouts), or rows that
are tokenized already: ``{"prompt": ids, "responses": [ids, ...]}``, with ``"scores"`` if there are any, or
``{"input_ids": ids, "completion_mask": mask}``; other columns of such rows are not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ppcompile.data.messages import Reason
from ppcompile.data.records import (
    ON_BAD,
    UNSCORED,
    BadRecord,
    OneSchema,
    Pairs,
    Preference,
    check_all_is_text,
    one_of,
    pairs_of_scores,
    parse_json,
    preference_from,
    read_scores,
)
from ppcompile.data.tokens import RecordTokenizer, TokenizedPreference
from ppcompile.runtime.groups import Group, Record, Rollout, as_record
from ppcompile.runtime.packing.pool import Item

__all__ = ["Sample", "SampleFilter", "SampleReader"]


MOST_REASONS = 20  # bad records that are kept by name; counts are exact


@dataclass(frozen=True, eq=False)
class Sample(Item):
    """A record that waits for its pack; :class:`Item` says what packing needs of it.

    Attributes:
        index: the record's row in the data set, ``batch.group_index`` of its group.
        weight: its pairs, or its sequences where there is nothing to prefer.
        pairs: ``(winner, loser)`` among its sequences; ``None`` where preferences make no sense or are not wanted.
        scores: one for each sequence, or ``None``.
        where: file and line, or row.
        schema: how the record was spelled.
    """

    pairs: Pairs | None = None
    scores: tuple[float, ...] | None = None
    where: str = ""
    schema: str = ""

    @property
    def name(self) -> str:
        """What messages call the record."""
        return self.where


@dataclass(frozen=True)
class SampleReader:
    """Raw rows to samples. Runs in worker processes, so a bad record is returned and not raised.

    Attributes:
        tokenizer: for records that are not token ids yet.
        unscored: what responses without scores mean, see :func:`ppcompile.data.read_preferences`.
        pairs: whether preferences are wanted.
    """

    tokenizer: RecordTokenizer | None = None
    unscored: str = "undecided"
    pairs: bool = True

    @classmethod
    def of(cls, tokenizer: Any, unscored: str, pairs: bool) -> SampleReader:
        """With a :class:`RecordTokenizer`, or the tokenizer that one would get."""
        if tokenizer is not None and not isinstance(tokenizer, RecordTokenizer):
            tokenizer = RecordTokenizer(tokenizer)
        return cls(tokenizer, one_of("unscored", unscored, UNSCORED), pairs)

    def __call__(self, index: int, where: str, raw: Any) -> Sample | BadRecord:
        """One row; ``where`` is what to call it if the record does not say better."""
        try:
            if isinstance(raw, str):  # a line of a file
                raw = parse_json(raw, where)
            if isinstance(raw, TokenizedPreference):
                return self._tokenized(index, raw, "tokenized", raw.pairs)
            if isinstance(raw, Preference):
                return self._text(index, raw)
            if isinstance(raw, Mapping) and _holds_ids(raw):
                return self._columns(index, where, raw)
            if isinstance(raw, (Group, Rollout, list, tuple)):
                return self._sample(index, _record(raw, where), where=where, schema="token ids")
            return self._text(index, preference_from(raw, where, self.unscored))
        except BadRecord as bad:
            return bad

    def _text(self, index: int, record: Preference) -> Sample:
        if self.tokenizer is None:
            raise BadRecord(record.where, "the record is text, and there is no tokenizer; give tokenizer=")
        pairs = record.pairs if record.comparable else None
        return self._tokenized(index, self.tokenizer(record), record.schema, pairs)

    def _tokenized(self, index: int, tokens: TokenizedPreference, schema: str, pairs: Pairs | None) -> Sample:
        record = _record(tokens.entry, tokens.where)
        return self._sample(index, record, pairs=pairs, scores=tokens.scores, where=tokens.where, schema=schema)

    def _columns(self, index: int, where: str, row: Mapping[str, Any]) -> Sample:
        """A row that is tokenized already."""
        try:
            check_all_is_text(row)
            if "input_ids" in row:
                entry: Any = Rollout(row["input_ids"], row.get("completion_mask"))
                return self._sample(index, _record(entry, where), where=where, schema="input_ids+completion_mask")
            record = _record(Group(row["prompt"], row.get("responses", ())), where)
            scores = read_scores(row.get("scores"), record.num_sequences)
        except Reason as reason:
            raise BadRecord(where, str(reason)) from None
        pairs = pairs_of_scores(scores, record.num_sequences, self.unscored)
        return self._sample(index, record, pairs=pairs, scores=scores, where=where, schema="prompt+responses of ids")

    def _sample(self, index: int, record: Record, *, pairs: Pairs | None = None, **others: Any) -> Sample:
        count = record.num_sequences
        pairs = pairs if self.pairs else None
        weight = float(count if pairs is None else len(pairs))
        return Sample(record, index, range(count), weight, pairs=pairs, **others)


def _holds_ids(row: Mapping[str, Any]) -> bool:
    prompt = row.get("prompt")
    if "input_ids" in row or isinstance(prompt, (np.ndarray, Tensor)):
        return True
    return isinstance(prompt, (list, tuple)) and isinstance(next(iter(prompt), None), (int, np.integer))


def _record(entry: Any, where: str) -> Record:
    try:
        return as_record(entry, "the record")
    except (TypeError, ValueError) as error:
        raise BadRecord(where, str(error)) from error


@dataclass
class SampleFilter:
    """What becomes of each record: packed, left out and counted, or the end of the run.

    Attributes:
        on_bad: ``"error"`` raises at the first bad record, ``"skip"`` leaves it out.
        records: records read.
        bad: records left out because they are bad.
        undecided: records left out because nothing in them is preferred to anything.
        reasons: the first few bad records, each with its place and its reason.
    """

    on_bad: str = "error"
    records: int = 0
    bad: int = 0
    undecided: int = 0
    reasons: list[BadRecord] = field(default_factory=list)
    _schema: OneSchema = field(default_factory=OneSchema, repr=False)

    def __post_init__(self) -> None:
        one_of("on_bad", self.on_bad, ON_BAD)

    def kept(self, found: Iterable[Sample | BadRecord]) -> Iterator[Sample]:
        """The samples to pack.

        Raises:
            BadRecord: under ``on_bad="error"``.
            ValueError: there is none.
        """
        empty = True
        for sample in found:
            self.records += 1
            try:
                if isinstance(sample, BadRecord):
                    raise sample
                self._schema.check(sample)
            except BadRecord as bad:
                self._leave_out(bad)
                continue
            if sample.pairs == ():
                self.undecided += 1
                continue
            empty = False
            yield sample
        if empty:
            raise ValueError(self._nothing_left())

    def _leave_out(self, bad: BadRecord) -> None:
        if self.on_bad == "error":
            raise bad
        self.bad += 1
        if len(self.reasons) < MOST_REASONS:
            self.reasons.append(bad)

    def _nothing_left(self) -> str:
        """Why an epoch would be empty, for an error."""
        advice = ""
        if self.undecided:
            advice = (
                ". Try: pairs=False if the loss compares no responses, or unscored='best-first' if they are so listed"
            )
        return f"there is nothing to pack: {self}{advice}"

    def __str__(self) -> str:
        text = f"{self.records:,} records"
        if self.undecided:
            text += f", {self.undecided:,} without a preference"
        if self.bad:
            text += f", {self.bad:,} bad:"
        return "\n  ".join([text, *map(str, self.reasons), *(["..."] if self.bad > len(self.reasons) else [])])
