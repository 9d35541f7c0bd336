"""Packs with what a preference loss needs beside the tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ppcompile.data.samples import Sample
from ppcompile.runtime.batch import PackedBatch, check_share, pack_records
from ppcompile.runtime.packing.packs import PackPlan

__all__ = ["PackCollator", "PreferenceBatch", "check_pairs", "samples_of", "write_pack"]


@dataclass(frozen=True, eq=False, repr=False)
class PreferenceBatch(PackedBatch):
    """A :class:`PackedBatch` that also says which of its responses are preferred.

    Attributes:
        pairs: int64 ``[N, 2]``, ``(winner, loser)`` as indices into the batch's responses, what
            ``ppcompile.losses.dpo_loss`` takes; ``None`` where the data has no preferences.
        scores: float32 ``[R]``, one for each response, nan for a record without any; ``None`` where none has them.
        ends_step: the rank's last pack of an optimizer step; save the loader's state there, when the step is done.
    """

    pairs: Tensor | None = None
    scores: Tensor | None = None
    ends_step: bool = False


def write_pack(plan: PackPlan, ends_step: bool, pad_to_multiple_of: int, pad_token_id: int) -> PreferenceBatch:
    """The tensors of a planned pack of samples."""
    batch = plan.batch(pad_to_multiple_of=pad_to_multiple_of, pad_token_id=pad_token_id)
    return _with_preferences(batch, samples_of(plan), ends_step)


def samples_of(plan: PackPlan) -> Sequence[Sample]:
    """The samples of a plan that was made of samples."""
    return cast("tuple[Sample, ...]", plan.items)


def check_pairs(samples: Sequence[Sample]) -> None:
    """Refuse a pack that holds one response of a pair without the other.

    Raises:
        ValueError: a record with preferences was split over several packs.
    """
    for sample in samples:
        if any(n not in sample.sequences for pair in sample.pairs or () for n in pair):
            raise ValueError(
                f"{sample.name} is split over several packs, where its preferred and its other responses do not meet. "
                "Try: pairs=False if the loss compares no responses, no split_groups, or another oversize policy"
            )


@dataclass(frozen=True)
class PackCollator:
    """For a ``DataLoader`` of your own: the samples of one pack to tensors.

    ``PackBatchSampler.collator()`` makes the one that fits its packs.

    Attributes:
        share: ``"prompt"`` or ``"tree"``, as for ``ppcompile.pack``.
        max_tokens: a pack beyond it is an error: it was chosen under another ``share``, or by other means.
        pad_to_multiple_of, pad_token_id: as in ``ppcompile.pack``.
    """

    share: str = "prompt"
    max_tokens: int | None = None
    pad_to_multiple_of: int = 1
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        check_share(self.share)

    def __call__(self, samples: Sequence[Sample]) -> PreferenceBatch:
        """One pack; ``group_index`` are rows of the data set. It knows no step: ``PackBatchSampler.totals()`` does.

        Raises:
            ValueError: they are more than ``max_tokens``.
        """
        batch = pack_records(
            [sample.record for sample in samples],
            share=self.share,
            max_tokens=self.max_tokens,
            pad_to_multiple_of=self.pad_to_multiple_of,
            pad_token_id=self.pad_token_id,
            group_index=[sample.index for sample in samples],
        )
        return _with_preferences(batch, samples, ends_step=False)


def _with_preferences(batch: PackedBatch, samples: Sequence[Sample], ends_step: bool) -> PreferenceBatch:
    fields: dict[str, Any] = {field.name: getattr(batch, field.name) for field in dataclasses.fields(PackedBatch)}
    return PreferenceBatch(**fields, pairs=_pairs(samples), scores=_scores(samples), ends_step=ends_step)


def _pairs(samples: Sequence[Sample]) -> Tensor | None:
    if all(sample.pairs is None for sample in samples):
        return None
    pairs, first = [], 0
    for sample in samples:
        place = {n: first + position for position, n in enumerate(sample.sequences)}
        pairs += [(place[winner], place[loser]) for winner, loser in sample.pairs or ()]
        first += len(sample.sequences)
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def _scores(samples: Sequence[Sample]) -> Tensor | None:
    if all(sample.scores is None for sample in samples):
        return None
    nan = float("nan")
    scores = [nan if sample.scores is None else sample.scores[n] for sample in samples for n in sample.sequences]
    return torch.tensor(scores, dtype=torch.float32)
