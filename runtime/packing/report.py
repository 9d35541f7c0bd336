"""What became of the groups: read, packed, cut, split, dropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["PackingReport"]

_EXAMPLES = 8  # cut and dropped groups that are kept by name; counts are exact


@dataclass
class PackingReport:
    """Counts over all ranks, as far as packing has come; grows while packs are made.

    Attributes:
        max_tokens: budget of a pack.
        groups: groups read.
        sequences: sequences of these groups.
        packs: packs made, for all ranks.
        tokens: tokens in them, each stored token once.
        unpacked_tokens: tokens of the sequences in them, each with its own prompt.
        parts: parts of groups in them, where a group's sequences stand in several packs.
        dropped_groups, dropped_sequences: groups of which something was left out by ``oversize="drop"`` or by
            ``drop_last``, and what.
        cut_groups, cut_tokens: shortened by ``"keep_start"`` or ``"keep_end"``, and tokens lost (each stored one once).
        divided_packs: packs cut in two so that every rank gets as many.
        examples: a few of the cut and dropped groups, in words.
    """

    max_tokens: int
    groups: int = 0
    sequences: int = 0
    packs: int = 0
    tokens: int = 0
    unpacked_tokens: int = 0
    parts: int = 0
    dropped_groups: int = 0
    dropped_sequences: int = 0
    cut_groups: int = 0
    cut_tokens: int = 0
    divided_packs: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def fill(self) -> float:
        """Tokens over budget, mean over all packs."""
        return self.tokens / (self.packs * self.max_tokens) if self.packs else 0.0

    @property
    def reduction(self) -> float:
        """Tokens of the unpacked sequences over tokens in the packs."""
        return self.unpacked_tokens / self.tokens if self.tokens else 1.0

    def add_dropped(self, sequences: int, name: str) -> None:
        """Count sequences of one group that are left out."""
        self.dropped_groups += 1
        self.dropped_sequences += sequences
        self.add_example(f"dropped {sequences:,} of {name}")

    def add_example(self, text: str) -> None:
        """Keep one of the first few in words."""
        if len(self.examples) < _EXAMPLES:
            self.examples.append(text)

    def lines(self) -> list[tuple[str, str]]:
        """Names and figures, those that are zero and exceptional left out."""
        found = [
            ("groups", f"{self.groups:,} with {self.sequences:,} sequences"),
            ("packs", f"{self.packs:,}, {self.fill:.1%} of {self.max_tokens:,} tokens filled"),
            ("tokens", f"{self.tokens:,} in place of {self.unpacked_tokens:,} ({self.reduction:.2f}x fewer)"),
        ]
        if self.dropped_sequences:
            found.append(("dropped", f"{self.dropped_sequences:,} sequences of {self.dropped_groups:,} groups"))
        if self.cut_groups:
            found.append(("cut", f"{self.cut_groups:,} groups, {self.cut_tokens:,} tokens lost"))
        if self.parts:
            found.append(("split", f"{self.parts:,} parts of groups that stand in several packs"))
        if self.divided_packs:
            found.append(("divided", f"{self.divided_packs:,} packs, so that all ranks get as many"))
        return found

    def __str__(self) -> str:
        return "\n".join([f"{name:8} {figure}" for name, figure in self.lines()] + [f"  {e}" for e in self.examples])

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table("", "packing", show_header=False, title="packing")
        for name, figure in self.lines():
            table.add_row(name, figure)
        for example in self.examples:
            table.add_row("", example)
        return table
