"""A whole data set as token ids in memory: what can be shuffled as a whole, counted, and indexed."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from torch.utils.data import Dataset

from ppcompile.data.reading import read_rows, read_samples
from ppcompile.data.samples import Sample, SampleFilter, SampleReader

__all__ = ["TokenizedDataset"]


class TokenizedDataset(Dataset[Sample]):
    """Every usable record of a data set, tokenized once.

    Eight bytes a token; a data set beyond that is for ``PackedDataLoader(..., streaming=True)``.

    Attributes:
        samples: the records.
        read: how many records were read, left out, and why.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any = None,
        *,
        on_bad: str = "error",
        unscored: str = "undecided",
        pairs: bool = True,
        num_workers: int = 0,
        multiprocessing_context: Any = None,
    ) -> None:
        """Read and tokenize.

        Args:
            dataset: any iterable of what ``ppcompile.data.samples`` lists, or the path of a file of records.
            tokenizer: a tokenizer, or a :class:`RecordTokenizer` for one with limits and options; none for token ids.
            on_bad: ``"error"`` raises at the first bad record, ``"skip"`` leaves it out and counts it.
            unscored: what responses without scores mean, see :func:`ppcompile.data.read_preferences`.
            pairs: leave out records in which nothing is preferred. ``False``: take all; no batch has ``pairs``.
            num_workers: processes that tokenize.
            multiprocessing_context: how they start, as for ``torch.utils.data.DataLoader``.

        Raises:
            BadRecord: a bad record, under ``on_bad="error"``.
            ValueError: no record is left, or an option is not accepted.
        """
        self.read = SampleFilter(on_bad)
        reader = SampleReader.of(tokenizer, unscored, pairs)
        with closing(read_samples(read_rows(dataset), reader, num_workers, multiprocessing_context)) as found:
            self.samples = list(self.read.kept(found))

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)
