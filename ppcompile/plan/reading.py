"""Records of any spelling, tokenized; what was skipped, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ppcompile.data.records import BadRecord
from ppcompile.data.samples import Sample, SampleFilter, SampleReader
from ppcompile.data.sources import raw_records

__all__ = ["Reading", "count", "read"]


@dataclass(frozen=True)
class Reading:
    """A data set as token ids.

    Attributes:
        samples: the records that are measured.
        records: records read.
        bad: records skipped because they are bad; ``reasons`` says why, of the first few.
        undecided: records in which nothing is preferred to anything.
        pairs: the samples carry preferences, and the undecided records are left out; or they do not, and none is.
        schema: how the records are spelled.
        reasons: place and reason of the first bad records.
    """

    samples: list[Sample]
    records: int
    bad: int
    undecided: int
    pairs: bool
    schema: str
    reasons: list[str]


def count(source: str, limit: int | None) -> int | None:
    """How many records :func:`read` will read, where that is quick to know: of files, whose lines are not parsed."""
    if not Path(source).is_file():
        return limit
    return sum(1 for _ in islice(raw_records(source, None), limit))


def read(
    source: str,
    tokenizer: Any = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    unscored: str = "undecided",
    pairs: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Reading:
    """Read, check and tokenize.

    Args:
        source: see :func:`ppcompile.data.read_preferences`.
        tokenizer: of text records; ``None`` where the data are token ids.
        split: of a folder or a hub name.
        limit: read at most this many records.
        unscored: what responses without scores mean, ``"undecided"`` or ``"best-first"``.
        pairs: leave out records in which nothing is preferred, as a loss over pairs has to.
        advance: called once for each record.

    Raises:
        BadRecord: the file as a whole cannot be read. A single bad record is skipped and counted.
        ValueError: no record is left, or an option is not accepted.
        OSError, EOFError, ImportError: there is no such file or data set, or no library to read it.
    """
    reader = SampleReader.of(tokenizer, unscored, pairs=True)
    kept = SampleFilter("skip")
    undecided: list[str] = []

    def found() -> Iterator[Sample | BadRecord]:
        for index, (where, raw) in enumerate(islice(raw_records(source, split), limit)):
            sample = reader(index, where, raw)
            if not pairs and isinstance(sample, Sample) and sample.pairs == ():
                undecided.append(sample.where)
                sample = replace(sample, pairs=None)
            yield sample
            advance()

    samples = list(kept.kept(found()))
    return Reading(
        samples=samples,
        records=kept.records,
        bad=kept.bad,
        undecided=kept.undecided + len(undecided),
        pairs=not undecided and samples[0].pairs is not None,
        schema=samples[0].schema,
        reasons=[str(reason) for reason in kept.reasons],
    )
