"""Packs as lists of indices, for a ``DataLoader`` of your own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import Sampler

from ppcompile.data.agreement import Agreement
from ppcompile.data.batches import PackCollator
from ppcompile.data.plans import Packing, Position, numbered, rank_and_world
from ppcompile.data.tokenized import TokenizedDataset
from ppcompile.runtime.batch import StepTotals

__all__ = ["PackBatchSampler"]


class PackBatchSampler(Sampler[list[int]]):
    """Which samples of a :class:`TokenizedDataset` go into a pack together: the ``batch_sampler`` of a ``DataLoader``.

        samples = TokenizedDataset(dataset, tokenizer)
        sampler = PackBatchSampler(samples, max_tokens=16384)
        loader = DataLoader(samples, batch_sampler=sampler, collate_fn=sampler.collator(), num_workers=2)

    Each rank gets its own packs, so ``accelerate.prepare`` must not divide the ``DataLoader`` again, and is refused. In
    ``torchdata``'s ``StatefulDataLoader`` the place in the epoch is part of the loader's state. Samples are taken
    whole: a record beyond the budget is an error or left out; cut long records with ``RecordTokenizer``'s limits, or
    use :class:`PackedDataLoader`, which also splits them.

    Attributes:
        samples: the data set.
        packing: what decides the packs.
        epoch: draws other packs from the same data, see :meth:`set_epoch`.
    """

    def __init__(
        self,
        samples: TokenizedDataset,
        *,
        oversize: str = "error",
        rank: int | None = None,
        world_size: int | None = None,
        **packing: Any,
    ) -> None:
        """Choose what decides the packs.

        Args:
            samples: the data set of the ``DataLoader``.
            oversize: what a record beyond the budget does: ``"error"`` or ``"drop"``.
            rank, world_size: default to those of ``torch.distributed``, if it is initialized.
            packing: ``max_tokens``, ``share``, ``seed``, ``shuffle``, ``sort``, ``drop_last``, ``window``,
                ``packs_per_step`` and ``cost`` of ``ppcompile.packs``.

        Raises:
            TypeError: ``samples`` is something else, such as records that have no lengths yet.
            TypeError, ValueError: an option that is not accepted.
        """
        if not isinstance(samples, TokenizedDataset):
            raise TypeError(
                f"samples must be a TokenizedDataset, got {type(samples).__name__}. "
                "Try: TokenizedDataset(dataset, tokenizer)"
            )
        if oversize not in ("error", "drop"):
            raise ValueError(
                f"oversize={oversize!r} is not accepted; an index stands for a whole record: 'error', 'drop'"
            )
        given, (rank, world_size) = rank, rank_and_world(rank, world_size)
        self._agreement = Agreement.of(given, rank, world_size)
        self.samples = samples
        self.packing = Packing(oversize=oversize, split_groups=False, rank=rank, world_size=world_size, **packing)
        self.packing.plans([], 0)  # refuse options now, not at the first batch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is."""
        self.epoch = epoch

    def __iter__(self) -> PackIndices:
        return PackIndices(self, self.epoch)

    def __len__(self) -> int:
        return self.packing.count(self._by_place(), self.epoch)

    @property
    def batch_size(self) -> int:
        """Packs have none, and only code that would divide them among ranks once more asks.

        Raises:
            TypeError: always. A part of each rank's packs would be left out, and nobody would notice.
        """
        raise TypeError(
            "a PackBatchSampler has no batch_size: its packs are dealt to ranks already, and would be divided a second "
            "time. Try: keep the DataLoader out of accelerate's prepare(), or use PackedDataLoader"
        )

    def collator(self, *, pad_to_multiple_of: int = 1, pad_token_id: int = 0) -> PackCollator:
        """The collate function that goes with this sampler's packs."""
        return PackCollator(self.packing.share, self.packing.max_tokens, pad_to_multiple_of, pad_token_id)

    def totals(self) -> list[StepTotals]:
        """For each pack of the epoch, the totals of the optimizer step it belongs to, over all ranks."""
        return [plan.step for plan in self.packing.plans(self._by_place(), self.epoch)]

    def _by_place(self) -> Sequence[Any]:
        return [replace(sample, index=place) for place, sample in enumerate(self.samples.samples)]


class PackIndices(Iterator[list[int]]):
    """One epoch of a :class:`PackBatchSampler`, with the state that ``torchdata`` asks an iterator for."""

    def __init__(self, sampler: PackBatchSampler, epoch: int) -> None:
        self._sampler = sampler
        self._begin(epoch, Position())

    def _begin(self, epoch: int, position: Position) -> None:
        self._epoch, self._position = epoch, position
        plans = self._sampler.packing.plans(self._sampler._by_place(), epoch)
        planned, agreement = numbered(plans, position, self._sampler.packing.world_size), self._sampler._agreement
        self._plans = planned if agreement is None else agreement.checked(planned, epoch)

    def __next__(self) -> list[int]:
        plan, self._position, _ = next(self._plans)
        return plan.group_index

    def state_dict(self) -> dict[str, Any]:
        """How far the epoch has come."""
        return {"epoch": self._epoch, **self._position._asdict(), "settings": self._sampler.packing.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the packs that a state counts.

        Raises:
            ValueError: other settings than those of the state; when packs are drawn, other data.
        """
        self._sampler.packing.check(state["settings"])
        self._begin(state["epoch"], Position(state["packs"], state["digest"]))
