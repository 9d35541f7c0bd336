"""What the benchmarks run on: a Llama of a given size, and batches of preference groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ppcompile import Group
from ppcompile.data import read_preferences
from ppcompile.data.tokens import tokenize

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCABULARY = 8192

Batch = list[Group]


@dataclass(frozen=True)
class Tokens:
    """Tokens that each layout computes for the same batches."""

    padded: int
    sorted: int
    unshared: int
    packed: int


def llama(width: int, layers: int, seed: int = 0) -> LlamaForCausalLM:
    """A Llama in float32 with random weights; width 384 and 8 layers have 20 million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config)


def groups_of(name: str) -> tuple[list[Group], str]:
    """The groups of a data set, and a line that says where they come from.

    ``dpo_en`` and ``qa_feedback`` are read from ``../shared/data`` where it exists; otherwise, and for ``synthetic``,
    groups of random tokens with log-normal lengths stand in.

    Raises:
        ValueError: responses of which not all is scored, such as conversations of many turns.
    """
    path = SHARED / f"{name}.jsonl.gz"
    if name == "synthetic" or not path.exists():
        return _synthetic(), f"synthetic groups ({path} is not there)" if name != "synthetic" else "synthetic groups"
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizer")
    records = read_preferences(path, unscored="best-first")
    entries = [tokenize(record, tokenizer).entry for record in records]
    groups = [entry for entry in entries if isinstance(entry, Group)]
    if len(groups) < len(entries):
        raise ValueError(f"{name} holds responses that are scored in part; this benchmark takes whole ones")
    return groups, f"{name}, {len(groups)} groups"


def _synthetic(count: int = 64, seed: int = 0) -> list[Group]:
    generator = torch.Generator().manual_seed(seed)

    def ids(median: float, spread: float) -> list[int]:
        length = int((torch.randn((), generator=generator) * spread).exp() * median) + 1
        return torch.randint(0, VOCABULARY, (min(length, 2000),), generator=generator).tolist()

    return [Group(ids(64, 0.8), [ids(48, 0.6), ids(48, 0.6)]) for _ in range(count)]


def batches_of(groups: Sequence[Group], size: int, limit: int | None) -> list[Batch]:
    """Consecutive batches of ``size`` groups, ``limit`` of them spread evenly over the data."""
    whole = [list(groups[start : start + size]) for start in range(0, len(groups) - size + 1, size)]
    if limit is None or limit >= len(whole):
        return whole
    return [whole[round(n * (len(whole) - 1) / max(1, limit - 1))] for n in range(limit)]


def by_length(batches: Sequence[Batch]) -> list[Batch]:
    """The same groups in batches of the same size, sorted by their longest sequence."""
    size = len(batches[0])
    groups = sorted((group for batch in batches for group in batch), key=longest)
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def longest(group: Group) -> int:
    """Tokens of the group's longest sequence."""
    return len(group.prompt) + max(len(response) for response in group.responses)


def count_tokens(batches: Sequence[Batch]) -> Tokens:
    """What each layout computes for these batches."""
    groups = [group for batch in batches for group in batch]
    return Tokens(
        padded=_padded(batches),
        sorted=_padded(by_length(batches)),
        unshared=sum(group.unpacked_tokens for group in groups),
        packed=sum(group.num_tokens for group in groups),
    )


def _padded(batches: Sequence[Batch]) -> int:
    return sum(max(map(longest, batch)) * sum(len(group.responses) for group in batch) for batch in batches)
