"""``PackedDataLoader``: any preference data in, packs out, as a data loader that people know.

    loader = ppcompile.PackedDataLoader(dataset, tokenizer=tokenizer, max_tokens=16384, num_workers=2)
    for epoch in range(3):
        for batch in loader:
            batch = batch.to(device)                                # PreferenceBatch, a PackedBatch
            logps, reference_logps = packed(batch).logps, ppcompile.reference_logps(reference, batch)
            loss = dpo_loss(logps, reference_logps, batch.pairs).losses.sum()
            (loss / batch.step.weight).backward()                   # the mean over all pairs of the step, on all ranks
            if batch.ends_step:
                optimizer.step(), optimizer.zero_grad()

Under ``DistributedDataParallel``, which averages over ranks, the loss is multiplied by ``world_size``.

**Two ways through the data.** What can be indexed, or is a file, is tokenized once and kept (eight bytes a token),
so that it is shuffled as a whole and the number of packs is known. Anything else, or all with ``streaming=True``, is
read as it is needed; only a window of it is in memory.

**Who does what.** This process reads rows and plans packs; ``num_workers`` processes parse and tokenize, and one more
writes the packs' tensors ahead of the training loop. Packs do not depend on the number of processes.

**Resume.** ``state_dict()`` counts the packs handed out in the epoch, with a checksum of them, and nothing else: which
packs these are follows from the data, the seed and the epoch. A loaded state plans them again without writing them,
with any number of workers, and refuses to go on where they are not the same. For a stream that means to read and
tokenize it again up to where it was. The methods are those of ``torchdata`` and ``torch.distributed.checkpoint``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ppcompile.data.agreement import Agreement
from ppcompile.data.batches import PreferenceBatch, write_pack
from ppcompile.data.plans import Packing, Planned, Position, check_settings, numbered, rank_and_world
from ppcompile.data.reading import can_be_indexed, load, read_rows, read_samples
from ppcompile.data.samples import Sample, SampleFilter, SampleReader
from ppcompile.data.sources import refuse_mapping
from ppcompile.data.tokenized import TokenizedDataset
from ppcompile.runtime.batch import check_int
from ppcompile.runtime.packing.cost import CostModel
from ppcompile.runtime.packing.report import PackingReport

__all__ = ["PackedDataLoader"]

STATE = "ppcompile.PackedDataLoader, 1"


class PackedDataLoader:
    """See the top of this file.

    Not a ``torch.utils.data.DataLoader`` by type, on purpose: libraries that divide every such loader among ranks
    (``accelerate.prepare``) would divide this one a second time; they leave it as it is.

    Attributes:
        dataset: as given.
        packing: what decides the packs.
        epoch: the epoch of the next iteration; rises by one behind each whole iteration.
        read: records read, bad, and without a preference (in this epoch, if streaming).
        report: what packing made of them in this epoch, as far as it has come.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        tokenizer: Any = None,
        max_tokens: int = 16384,
        share: str = "prompt",
        seed: int = 0,
        shuffle: bool = True,
        sort: bool = False,
        oversize: str | tuple[str, ...] = "error",
        split_groups: bool = False,
        drop_last: bool = False,
        window: int = 64,
        packs_per_step: int = 1,
        cost: CostModel | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        on_bad: str = "error",
        unscored: str = "undecided",
        pairs: bool = True,
        streaming: bool | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch: int = 2,
        multiprocessing_context: Any = None,
        pad_to_multiple_of: int = 1,
        pad_token_id: int = 0,
    ) -> None:
        """Check the options; unless streaming, read and tokenize the data.

        Args:
            dataset: a list, a ``datasets`` data set of either kind, a torch data set, the path of a file of records,
                or any iterable of what ``ppcompile.data.samples`` lists. Every rank is given all, in the same order.
            tokenizer: a transformers tokenizer, or a :class:`ppcompile.data.RecordTokenizer` for one with limits and
                options. None where the data are token ids.
            max_tokens, share, seed, shuffle, sort, oversize, split_groups, drop_last, window, packs_per_step, cost: see
                ``ppcompile.packs``.
            rank, world_size: default to those of ``torch.distributed``, if it is initialized.
            on_bad: ``"error"`` raises at the first bad record, by place and reason; ``"skip"`` leaves bad records out,
                counts them, and keeps the first few in ``read.reasons``.
            unscored: what responses without scores mean, see :func:`ppcompile.data.read_preferences`.
            pairs: batches carry ``pairs``, steps weigh as many, and records in which nothing is preferred are left
                out and counted. ``False``: all records, no pairs, and steps weigh as many as sequences.
            streaming: read as needed; ``None``: only what cannot be indexed, a file aside.
            num_workers: processes that tokenize; with at least one of them, one more writes tensors.
            pin_memory: put packs into page-locked memory.
            prefetch: packs written ahead, with ``num_workers``.
            multiprocessing_context: how processes start, as for ``torch.utils.data.DataLoader``.
            pad_to_multiple_of, pad_token_id: see ``ppcompile.pack``.

        Raises:
            BadRecord: see ``on_bad``; while iterating, if streaming.
            TypeError, ValueError: an option that is not accepted, or data of which nothing is left to pack; while
                iterating, ranks that were given different data.
        """
        given, (rank, world_size) = rank, rank_and_world(rank, world_size)
        self._agreement = Agreement.of(given, rank, world_size)
        for name, value, least in (
            ("num_workers", num_workers, 0),
            ("prefetch", prefetch, 1),
            ("pad_to_multiple_of", pad_to_multiple_of, 1),
            ("pad_token_id", pad_token_id, 0),
        ):
            check_int(name, value, least)
        if getattr(dataset, "_distributed", None) is not None:
            raise ValueError(
                "the data set was divided by datasets.distributed.split_dataset_by_node; give every rank all of it: "
                "the loader deals packs so that no rank has more of them than another"
            )
        refuse_mapping(dataset)
        self.dataset = dataset
        self.packing = Packing(
            max_tokens=max_tokens,
            share=share,
            seed=seed,
            shuffle=shuffle,
            sort=sort,
            oversize=oversize,
            split_groups=split_groups,
            drop_last=drop_last,
            window=window,
            packs_per_step=packs_per_step,
            cost=cost,
            rank=rank,
            world_size=world_size,
        )
        self.report: PackingReport = self.packing.plans([], 0).report  # refuses options now, not at the first batch
        self.read = SampleFilter(on_bad)
        known = can_be_indexed(dataset) or isinstance(dataset, (str, Path))
        self.streaming = not known if streaming is None else streaming
        self.num_workers, self.pin_memory, self.prefetch = num_workers, pin_memory, prefetch
        self._context = multiprocessing_context
        self._write = _Writer(pad_to_multiple_of, pad_token_id)
        self._reader = SampleReader.of(tokenizer, unscored, pairs)
        self.epoch = 0
        self._position = self._start = Position()
        self._lengths: dict[int, int] = {}
        self._used_up = False
        self._samples = None if self.streaming else self._in_memory(on_bad, unscored, pairs)

    # ------------------------------------------------------------------ iteration

    def __iter__(self) -> Iterator[PreferenceBatch]:
        """One epoch, or what a loaded state leaves of it."""
        self._position, self._start = self._start, Position()
        written = load(
            self._write,
            self._plans(self.epoch, self._position),
            num_workers=min(self.num_workers, 1),
            prefetch=self.prefetch,
            pin_memory=self.pin_memory,
            multiprocessing_context=self._context,
        )
        for batch, position in written:
            self._position = Position(*position)
            yield batch
        self.epoch, self._position = self.epoch + 1, Position()

    def set_epoch(self, epoch: int) -> None:
        """Draw the packs of another epoch in the next iteration. Not needed: each iteration is the next epoch.

        Raises:
            ValueError: a state in the middle of another epoch was loaded, and has not been continued yet.
        """
        check_int("epoch", epoch, least=0)
        if self._start != Position() and epoch != self.epoch:
            raise ValueError(
                f"the state that was loaded is in the middle of epoch {self.epoch}, and set_epoch({epoch}) would leave "
                "the rest of it out; begin the loop over epochs at loader.epoch"
            )
        self.epoch = epoch

    def __len__(self) -> int:
        """Packs of this rank in the epoch.

        Raises:
            TypeError: streaming, where that is not known before the end.
        """
        if self._samples is None:
            raise TypeError(
                "a streaming PackedDataLoader has no length: how many packs a stream makes is known at its end. "
                "Try: streaming=False, or train for a number of steps"
            )
        if self.epoch not in self._lengths:
            self._lengths[self.epoch] = self.packing.count(self._samples, self.epoch)
        return self._lengths[self.epoch]

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The place in the data behind the last batch that was handed out; plain values. Each rank has its own."""
        return {"format": STATE, "epoch": self.epoch, **self._position._asdict(), "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there in the next iteration.

        Raises:
            ValueError: not a state of this class, or of a loader with other settings. That the data are still the same
                is checked when iteration begins.
        """
        if state.get("format") != STATE:
            raise ValueError(f"the state is of {state.get('format')!r}, and this loader reads {STATE!r}")
        check_settings(state["settings"], self._settings())
        self.epoch = state["epoch"]
        self._position = self._start = Position(state["packs"], state["digest"])

    def _settings(self) -> dict[str, Any]:
        return {**self.packing.settings(), "streaming": self.streaming, "pairs": self._reader.pairs}

    # ------------------------------------------------------------------ stages

    def _in_memory(self, on_bad: str, unscored: str, pairs: bool) -> list[Sample]:
        tokenized = TokenizedDataset(
            self.dataset,
            self._reader.tokenizer,
            on_bad=on_bad,
            unscored=unscored,
            pairs=pairs,
            num_workers=self.num_workers,
            multiprocessing_context=self._context,
        )
        self.read = tokenized.read
        return tokenized.samples

    def _plans(self, epoch: int, start: Position) -> Iterator[Planned]:
        plans = self.packing.plans(self._stream(epoch) if self._samples is None else self._samples, epoch)
        self.report = plans.report
        planned = numbered(plans, start, self.packing.world_size)
        return planned if self._agreement is None else self._agreement.checked(planned, epoch)

    def _stream(self, epoch: int) -> Iterator[Sample]:
        """Samples of one epoch, read as they are asked for."""
        if self._used_up:
            raise ValueError(
                f"the data set is an iterator ({type(self.dataset).__name__}) and is used up after one epoch. "
                "Try: a list, or an object whose iter() begins anew"
            )
        self._used_up = isinstance(self.dataset, Iterator)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)  # a stream of `datasets` that shuffles
        order = np.random.default_rng((self.packing.seed, epoch)) if self.packing.shuffle else None
        self.read = SampleFilter(self.read.on_bad)
        rows = read_rows(self.dataset, order)
        with closing(read_samples(rows, self._reader, self.num_workers, self._context)) as found:
            yield from self.read.kept(found)


class _Writer(Dataset[tuple[PreferenceBatch, Position]]):
    """A data set whose index *is* a plan: that is how plans travel to the process that writes them."""

    def __init__(self, pad_to_multiple_of: int, pad_token_id: int) -> None:
        self._padding = pad_to_multiple_of, pad_token_id

    def __getitem__(self, planned: Planned) -> tuple[PreferenceBatch, Position]:
        return write_pack(planned.plan, planned.ends_step, *self._padding), planned.position
