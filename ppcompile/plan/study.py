"""All that is measured and predicted for one data set, and the settings that follow.

The budget: candidates are the powers of two from ``LEAST_BUDGET`` on that hold the largest record and that memory
holds, up to the first that holds the whole set, and the largest that memory holds. Those that make fewer than
``ENOUGH_PACKS`` of an epoch are left aside, unless all do: training needs steps. A larger budget shares more (with
``share="tree"``) and fills better, until it does not: the smallest candidate is taken whose reduction of tokens is
within ``CLOSE`` of the best one, but none below ``USUAL_BUDGET`` if there are larger ones, because small packs leave a
GPU short of work. Where memory does not hold the largest record, the budget is what memory holds, and records beyond
it are cut or split.

The sharing: ``"tree"`` where it stores at least ``WORTH`` fewer tokens than ``"prompt"`` at that budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ppcompile.plan.budgets import Packed, packed
from ppcompile.plan.cost import Machine, epoch_flops, fitting_budget, step_bytes
from ppcompile.plan.lengths import Distribution, Lengths, Padded, Sharing, distributions, padded, sharing
from ppcompile.plan.reading import Reading
from ppcompile.plan.size import ModelSize

__all__ = ["Predicted", "Study", "best", "study"]

LEAST_BUDGET, USUAL_BUDGET = 1024, 16384
CLOSE, WORTH = 0.01, 0.02
ENOUGH_PACKS = 16


@dataclass(frozen=True)
class Predicted:
    """One way to batch the data, and what it costs.

    Attributes:
        name: for people.
        steps: batches or packs of an epoch.
        slots: tokens computed in an epoch, padding included.
        padding: slots that hold no token.
        flops: operations of an epoch.
        bytes: of the largest step.
    """

    name: str
    steps: int
    slots: int
    padding: int
    flops: float
    bytes: float


@dataclass(frozen=True)
class Study:
    """What ``ppcompile plan`` tells.

    Attributes:
        reading: the records.
        size, machine: what costs are predicted for.
        distributions: of lengths and shares.
        sharing: unique tokens of the whole set.
        usual: the usual layout at each batch size, as the data come and sorted.
        budgets: packs by budget, with ``share="prompt"`` and ``"tree"``.
        layouts: the usual layouts and packs of the chosen budget, with costs; the recommended packs come last.
        chosen: the recommended packs.
        fits: the most tokens of a pack that memory holds; 0 where it does not even hold the model.
        longest: tokens of the longest sequence.
        largest_id: of all tokens.
    """

    reading: Reading
    size: ModelSize
    machine: Machine
    distributions: list[Distribution]
    sharing: Sharing
    usual: list[Padded]
    budgets: list[Packed]
    layouts: list[Predicted]
    chosen: Packed
    fits: int
    longest: int
    largest_id: int

    @property
    def sample_count(self) -> int:
        """Records that are measured."""
        return len(self.reading.samples)

    @property
    def usual_costs(self) -> list[Predicted]:
        """Costs of :attr:`usual`."""
        return self.layouts[: len(self.usual)]

    @property
    def packed_costs(self) -> list[Predicted]:
        """Costs of packs at the chosen budget: nothing shared first, the recommended ones last."""
        return self.layouts[len(self.usual) :]

    def cheaper(self, layout: Predicted) -> float:
        """How many times fewer operations the recommended packs take."""
        return layout.flops / self.recommended.flops

    @property
    def recommended(self) -> Predicted:
        """The costs of :attr:`chosen`."""
        return self.layouts[-1]

    def bytes_of(self, entry: Packed) -> float:
        """Memory of a step with packs like these."""
        return step_bytes(entry, self.size, self.machine)

    def numbers(self) -> dict[str, Any]:
        """Everything as plain values for JSON; ratios included, samples not."""
        usual = [{**dataclasses.asdict(layout), "waste": layout.waste} for layout in self.usual]
        layouts = [
            {**dataclasses.asdict(layout), "packed_is_cheaper_by": self.cheaper(layout)} for layout in self.layouts
        ]
        reading = {k: getattr(self.reading, k) for k in ("records", "bad", "undecided", "pairs", "schema", "reasons")}
        kinds = ("prompt_once", "record_trie", "set_trie")
        return {
            "reading": {**reading, "measured": self.sample_count},
            "model": dataclasses.asdict(self.size),
            "machine": dataclasses.asdict(self.machine),
            "distributions": [dataclasses.asdict(distribution) for distribution in self.distributions],
            "unique_tokens": dataclasses.asdict(self.sharing),
            "reductions": {kind: self.sharing.reduction(kind) for kind in kinds},
            "padded": usual,
            "budgets": [{**_with_ratios(entry), "bytes": self.bytes_of(entry)} for entry in self.budgets],
            "layouts": layouts,
            "recommended": {**_with_ratios(self.chosen), "largest_budget_that_fits": self.fits},
            "longest_sequence": self.longest,
            "largest_token_id": self.largest_id,
        }


def _with_ratios(entry: Packed) -> dict[str, Any]:
    return {**dataclasses.asdict(entry), "fill": entry.fill, "reduction": entry.reduction}


def study(
    reading: Reading,
    size: ModelSize,
    machine: Machine,
    *,
    batch_sizes: Sequence[int] = (4, 8, 16),
    max_tokens: int | None = None,
    advance: Callable[[str], None] = lambda doing: None,
) -> Study:
    """Measure, predict, choose.

    Args:
        reading: the records.
        size: of the model.
        machine: that trains it.
        batch_sizes: records of a batch in the usual layout.
        max_tokens: a budget to take instead of the best one.
        advance: called with what is done next.

    Raises:
        ValueError: no record fits into a pack of ``max_tokens``.
    """
    advance("counting unique tokens")
    samples = reading.samples
    records = [sample.record for sample in samples]
    lengths = Lengths.of(records)
    unique, between_records = sharing(records)
    usual = [padded(lengths, count, by_length) for count in batch_sizes for by_length in (False, True)]
    fits = max(0, fitting_budget(size, machine))
    budgets: list[Packed] = []
    for budget in _candidates(int(lengths.packed.max()), unique.prompt_once, fits, max_tokens):
        advance(f"packing at {budget:,} tokens")
        budgets += [packed(samples, budget, share, pairs=reading.pairs) for share in ("prompt", "tree")]
    taken = best(budgets, max_tokens)
    advance("predicting costs")
    shares = [share for share in ("none", "prompt", "tree") if share != taken.share]
    at_best = [
        packed(samples, taken.max_tokens, share, pairs=reading.pairs, count_scored=True)
        for share in (*shares, taken.share)
    ]
    layouts: list[Padded | Packed] = [*usual, *at_best]
    return Study(
        reading=reading,
        size=size,
        machine=machine,
        distributions=distributions(lengths, between_records),
        sharing=unique,
        usual=usual,
        budgets=budgets,
        layouts=[_predicted(layout, size, machine) for layout in layouts],
        chosen=at_best[-1],
        fits=fits,
        longest=int(lengths.sequences.max()),
        largest_id=max(int(ids.max()) for r in records for ids in (r.prompt, *r.responses) if len(ids)),
    )


def _candidates(largest: int, stored: int, fits: int, wanted: int | None) -> list[int]:
    """Budgets to look at, ascending.

    Args:
        largest: tokens of the largest record.
        stored: tokens of all, prompts once.
        fits: the most that memory holds.
        wanted: one that was asked for.
    """
    budgets: list[int] = []
    budget = LEAST_BUDGET
    while budget <= fits and (not budgets or budgets[-1] < stored):
        if budget >= largest:
            budgets.append(budget)
        budget *= 2
    most = fits // LEAST_BUDGET * LEAST_BUDGET
    if most and (not budgets or (budgets[-1] < stored and most > 1.25 * budgets[-1])):
        budgets.append(most)
    if not budgets and wanted is None:  # memory does not even hold the model; what packs would be like all the same
        budgets.append(max(USUAL_BUDGET, largest))
    return sorted({*budgets, *([wanted] if wanted is not None else [])})


def best(budgets: Sequence[Packed], wanted: int | None) -> Packed:
    """The packs to recommend, by the rules at the top.

    Args:
        budgets: of each budget both ways to share.
        wanted: a budget that was asked for.
    """
    by_budget = {(entry.max_tokens, entry.share): entry for entry in budgets}
    candidates = sorted({entry.max_tokens for entry in budgets})

    def better(budget: int) -> Packed:
        prompt, tree = by_budget[budget, "prompt"], by_budget[budget, "tree"]
        # By reduction, because records beyond the budget may have been cut otherwise.
        return tree if tree.reduction >= prompt.reduction / (1 - WORTH) else prompt

    if wanted is not None:
        return better(wanted)
    enough = [better(b) for b in candidates if better(b).steps >= ENOUGH_PACKS] or [better(candidates[0])]
    usual = [entry for entry in enough if entry.max_tokens >= USUAL_BUDGET] or enough[-1:]
    most = max(entry.reduction for entry in usual)
    return next(entry for entry in usual if entry.reduction >= (1 - CLOSE) * most)


def _predicted(layout: Padded | Packed, size: ModelSize, machine: Machine) -> Predicted:
    return Predicted(
        name=_name(layout),
        steps=layout.steps,
        slots=layout.slots,
        padding=layout.padding,
        flops=epoch_flops(layout, size, machine),
        bytes=step_bytes(layout, size, machine),
    )


def _name(layout: Padded | Packed) -> str:
    if isinstance(layout, Padded):
        return f"padded {layout.batch_size}" + ", sorted" * layout.by_length
    return "packed, " + ("unshared" if layout.share == "none" else layout.share)
