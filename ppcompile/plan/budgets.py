"""Packs at a budget of tokens, measured: the packs that training would get, planned and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppcompile.runtime.packing.oversize import size_of
from ppcompile.runtime.packing.packs import plan_packs
from ppcompile.runtime.packing.pool import Item

__all__ = ["SHARES", "Packed", "oversize_policy", "packed"]

SHARES = ("none", "prompt", "tree")
"""What packs store once: nothing, which is packing alone; prompts; every common beginning."""


@dataclass(frozen=True)
class Packed:
    """One epoch of packs.

    Attributes:
        share: one of :data:`SHARES`.
        max_tokens: budget of a pack.
        steps: packs of the epoch.
        slots: stored tokens, of all packs.
        unpacked: tokens of the sequences in them, each with its own prompt.
        pairs: a token and one that it sees: what attention works on.
        scored: slots whose log-probability is computed, each once; 0 unless they were counted.
        largest: tokens of the largest pack.
        beyond: records (where nothing is shared: sequences) that do not fit into a pack of their own.
        cut: of them, records that were shortened.
        dropped: sequences of them that were left out.
    """

    share: str
    max_tokens: int
    steps: int
    slots: int
    unpacked: int
    pairs: int
    scored: int
    largest: int
    beyond: int
    cut: int
    dropped: int

    @property
    def padding(self) -> int:
        """Slots that hold no token: none."""
        return 0

    @property
    def fill(self) -> float:
        """Tokens over budget, mean over all packs."""
        return self.slots / (self.steps * self.max_tokens)

    @property
    def reduction(self) -> float:
        """How many times fewer tokens than unpacked."""
        return self.unpacked / self.slots


def oversize_policy(pairs: bool) -> tuple[str, ...]:
    """What becomes of records beyond the budget: a pair stays in one pack, other groups may be split over several."""
    return ("keep_start", "drop") if pairs else ("split", "keep_start", "drop")


def packed(
    samples: Sequence[Item], max_tokens: int, share: str, *, pairs: bool = False, count_scored: bool = False
) -> Packed:
    """Plan the packs of the first epoch, with the settings that a ``PackedDataLoader`` starts from.

    Args:
        samples: records.
        max_tokens: budget of a pack.
        share: one of :data:`SHARES`.
        pairs: see :func:`oversize_policy`.
        count_scored: write the packs' layouts to count their scored slots.

    Raises:
        ValueError: no record fits, not even shortened.
    """
    stored = "tree" if share == "tree" else "prompt"
    items = _apart(samples) if share == "none" else samples
    plans = plan_packs(items, max_tokens=max_tokens, share=stored, oversize=oversize_policy(pairs))
    seen = scored = largest = 0
    for plan in plans:
        seen += plan.work.pairs
        largest = max(largest, plan.work.tokens)
        scored += len(plan.batch().targets) if count_scored else 0
    report = plans.report
    if not report.packs:
        raise ValueError(f"no record fits into packs of {max_tokens:,} tokens, not even shortened; try a larger budget")
    return Packed(
        share=share,
        max_tokens=max_tokens,
        steps=report.packs,
        slots=report.tokens,
        unpacked=report.unpacked_tokens,
        pairs=seen,
        scored=scored,
        largest=largest,
        beyond=sum(_is_beyond(item, max_tokens, stored) for item in items),
        cut=report.cut_groups,
        dropped=report.dropped_sequences,
    )


def _is_beyond(item: Item, max_tokens: int, share: str) -> bool:
    # Sharing every beginning never takes more than sharing prompts, and that is known without sorting.
    return item.record.num_tokens > max_tokens and size_of(item.record, share) > max_tokens


def _apart(samples: Sequence[Item]) -> list[Item]:
    """Every sequence as a group of its own."""
    return [sample.part([n]) for sample in samples for n in range(sample.record.num_sequences)]
