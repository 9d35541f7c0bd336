"""Rows of a data set into samples, by this process or by workers, in the order of the rows either way.

This process reads, so that a data set of any kind is read once whatever the number of workers (data sets of
``datasets`` and ``torch`` would divide themselves among workers, or not); workers parse and tokenize chunks of rows.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sized
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ppcompile.data.records import BadRecord
from ppcompile.data.samples import Sample, SampleReader
from ppcompile.data.sources import raw_records, record_at

__all__ = ["Row", "can_be_indexed", "load", "read_rows", "read_samples"]

Row = tuple[int, str, Any]
"""Index, words that say where it stands, and the raw record."""

T = TypeVar("T")

CHUNK = 32  # rows that travel to a worker at once


def can_be_indexed(dataset: Any) -> bool:
    """A list, a table, a map-style data set; not a stream, nor a file that is read line by line."""
    if isinstance(dataset, (str, IterableDataset)):  # torch's streams inherit a __getitem__ that only raises
        return False
    return isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")


def read_rows(dataset: Any, order: np.random.Generator | None = None) -> Iterator[Row]:
    """Rows of a data set, or of the file that a path names; shuffled by ``order`` if they can be indexed."""
    if order is not None and can_be_indexed(dataset):
        for index in order.permutation(len(dataset)).tolist():
            yield index, *record_at(dataset, index)
        return
    for index, (where, raw) in enumerate(raw_records(dataset, None)):
        yield index, where, raw


def read_samples(
    rows: Iterable[Row], reader: SampleReader, num_workers: int = 0, multiprocessing_context: Any = None
) -> Generator[Sample | BadRecord, None, None]:
    """Rows as samples, in order. Close it when something fails half-way, so that the workers end."""
    chunks = load(
        _Chunks(reader), _chunked(rows), num_workers=num_workers, multiprocessing_context=multiprocessing_context
    )
    for chunk in chunks:
        yield from chunk


def load(
    dataset: Dataset[T],
    indices: Iterable[Any],
    *,
    num_workers: int,
    multiprocessing_context: Any = None,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Iterator[T]:
    """``dataset[index]`` for each index, by worker processes if there are any, in order.

    The indices come from an iterator that may fail (a bad record, a lost connection). Its error is raised behind all
    that came before it, when the workers are gone: an error that passes through a ``DataLoader`` keeps parts of it
    alive, to be collected in an order that closes files twice.
    """
    failures: list[Exception] = []

    def until_failure() -> Iterator[Any]:
        try:
            yield from indices
        except Exception as error:  # noqa: BLE001 - any; it is raised below
            failures.append(error)

    yield from DataLoader(
        dataset,
        batch_size=None,
        sampler=until_failure(),
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=pin_memory,
        collate_fn=_unchanged,
        multiprocessing_context=multiprocessing_context if num_workers else None,
        generator=torch.Generator(),  # without one of its own it draws from the generator that dropout draws from
    )
    if failures:
        raise failures[0]


class _Chunks(Dataset[list[Sample | BadRecord]]):
    """A data set whose index *is* a chunk of rows: that is how rows travel to workers."""

    def __init__(self, reader: SampleReader) -> None:
        self._reader = reader

    def __getitem__(self, chunk: list[Row]) -> list[Sample | BadRecord]:
        return [self._reader(*row) for row in chunk]


def _chunked(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _unchanged(value: Any) -> Any:
    return value
