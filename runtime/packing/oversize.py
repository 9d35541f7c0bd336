"""A group beyond the budget: what each policy makes of it.

==============  ========================================================================================
``error``       raise, and say which group and by how much
``keep_start``  cut the ends: all sequences to the greatest length with which the group fits
``keep_end``    cut the beginning that all sequences have in common, as far as it is not scored
``split``       several parts, the common beginning repeated in each
``drop``        leave it out
==============  ========================================================================================

A policy that cannot make a group fit (``split`` with a sequence that alone is too long; a cut that would leave a
sequence nothing to score) leaves it to the next one of ``oversize=("split", "keep_start")``, and after the last
one it is an error: nothing is cut or dropped that was not asked for. Whatever is cut, split or dropped is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..groups import Record, flat_sequences, record_of_rows
from ..prefixes import sort_sequences
from .pool import Item, make_pool
from .report import PackingReport

__all__ = ["POLICIES", "Budget", "check_policies", "size_of"]

POLICIES = ("error", "keep_start", "keep_end", "split", "drop")


def check_policies(oversize: str | Sequence[str]) -> tuple[str, ...]:
    """``oversize`` as a tuple of names.

    Raises:
        ValueError: none, or an unknown one.
    """
    names = (oversize,) if isinstance(oversize, str) else tuple(oversize)
    if not names or not set(names) <= set(POLICIES):
        raise ValueError(
            f"oversize={oversize!r} is not accepted; take one of {', '.join(map(repr, POLICIES))}, "
            "or several of them, to be tried in order"
        )
    return names


def size_of(record: Record, share: str) -> int:
    """Tokens of a group in a pack of its own."""
    if share == "prompt" or record.num_sequences == 1:
        return record.num_tokens
    return sort_sequences(*flat_sequences([record])).num_tokens


@dataclass(frozen=True)
class Budget:
    """The budget of a pack, and what happens to groups beyond it.

    Attributes:
        max_tokens: the budget.
        share: ``"prompt"`` or ``"tree"``.
        policies: names of :data:`POLICIES`, tried in order.
        split_groups: packs may hold parts of groups anyway, so it is enough that every sequence fits by itself.
    """

    max_tokens: int
    share: str
    policies: tuple[str, ...]
    split_groups: bool

    def fit(self, item: Item, report: PackingReport) -> list[Item]:
        """The item as packs may take it: itself where it fits, else what the policies make of it.

        Raises:
            ValueError: it does not fit, and no policy helps.
        """
        if self._fits(item.record):
            return [item]
        lost = report.cut_tokens
        if self.split_groups:
            short, long = self._by_length(item)
            found = [*short, *(part for one in long for part in self._apply(self.policies, one, report))]
        else:
            found = self._apply(self.policies, item, report)
        report.cut_groups += report.cut_tokens > lost
        dropped = len(item.sequences) - sum(len(part.sequences) for part in found)
        if dropped:
            report.add_dropped(dropped, self._describe(item))
        return found

    def _fits(self, record: Record) -> bool:
        # Sharing every beginning never takes more than sharing prompts, and that is known without sorting.
        return record.num_tokens <= self.max_tokens or size_of(record, self.share) <= self.max_tokens

    def _by_length(self, item: Item) -> tuple[list[Item], list[Item]]:
        """One item of all sequences that fit by themselves, if there are any; and one for each that does not."""
        prompt = len(item.record.prompt)
        fits = [prompt + len(response) <= self.max_tokens for response in item.record.responses]
        short = [n for n, ok in enumerate(fits) if ok]
        return [item.part(short)] if short else [], [item.part([n]) for n, ok in enumerate(fits) if not ok]

    def _apply(self, policies: Sequence[str], item: Item, report: PackingReport) -> list[Item]:
        if self._fits(item.record):
            return [item]
        if not policies or policies[0] == "error":
            raise ValueError(self._refusal(item))
        policy, others = policies[0], policies[1:]
        if policy == "drop":
            return []
        if policy == "split" and item.record.num_sequences > 1:
            short, long = self._by_length(item)
            parts = [part for whole in short for part in self._split(whole)]
            return parts + [part for one in long for part in self._apply(others, one, report)]
        cut = {"keep_start": self._keep_start, "keep_end": self._keep_end}.get(policy, _no_cut)(item.record)
        if cut is None:
            return self._apply(others, item, report)
        lost = size_of(item.record, self.share) - size_of(cut, self.share)
        report.cut_tokens += lost
        report.add_example(f"cut {lost:,} tokens ({policy}) of {self._describe(item)}")
        return [replace(item, record=cut)]

    def _split(self, item: Item) -> list[Item]:
        """Parts that fit, as full as can be."""
        pool, parts = make_pool([item], self.share), []
        while pool.waiting[0]:
            pool.open()
            positions = list(pool.left[0])
            if pool.needs[0] > self.max_tokens:
                positions = max(pool.parts(0, self.max_tokens), key=lambda part: part.added - part.repeated).positions
            pool.take(0, positions)
            parts.append(item.part(positions))
        return parts

    def _keep_start(self, record: Record) -> Record | None:
        """All sequences cut to one length, which leaves each of them something to score."""
        least, most = max(_first_scored(record)) + 1, len(record.prompt) + max(map(len, record.responses))
        if not self._fits(_first_tokens(record, least)):
            return None
        while least + 1 < most:  # `least` fits and `most` does not
            middle = (least + most) // 2
            least, most = (middle, most) if self._fits(_first_tokens(record, middle)) else (least, middle)
        return _first_tokens(record, least)

    def _keep_end(self, record: Record) -> Record | None:
        """The common beginning shortened, which leaves at least one token in front of what is scored."""
        excess = size_of(record, self.share) - self.max_tokens  # all share it, so it is stored once either way
        if excess >= min(len(record.prompt), *_first_scored(record)):
            return None
        masks = None if record.masks is None else tuple(mask[excess:] for mask in record.masks)
        return Record(record.prompt[excess:], record.responses, masks)

    def _describe(self, item: Item) -> str:
        sizes = [len(response) for response in item.record.responses]
        shown = ", ".join(f"{size:,}" for size in sizes[:8]) + ", ..." * (len(sizes) > 8)
        need = size_of(item.record, self.share)
        return f"{item.name} (prompt {len(item.record.prompt):,}, responses {shown}: {need:,} tokens)"

    def _refusal(self, item: Item) -> str:
        tried = [policy for policy in self.policies if policy != "error"]
        helpless = f" oversize={'+'.join(tried)} could not make it fit." if tried else ""
        others = ", ".join(repr(policy) for policy in POLICIES[1:] if policy not in tried)
        return (
            f"{self._describe(item)} is beyond max_tokens={self.max_tokens:,}.{helpless} Nothing was dropped or cut. "
            f"Try: raise max_tokens, or oversize= one of {others}, or several of them, to be tried in order"
        )


def _no_cut(record: Record) -> Record | None:
    return None


def _first_scored(record: Record) -> list[int]:
    """Position of the first scored token of each sequence."""
    if record.masks is None:
        return [len(record.prompt)] * record.num_sequences
    return [int(mask.argmax()) for mask in record.masks]


def _first_tokens(record: Record, length: int) -> Record:
    """Every sequence cut to at most ``length`` tokens."""
    prompt = len(record.prompt)
    if record.masks is None:
        return Record(record.prompt, tuple(response[: length - prompt] for response in record.responses))
    rows = [np.concatenate([record.prompt, response])[:length] for response in record.responses]
    return record_of_rows(rows, tuple(mask[:length] for mask in record.masks))
