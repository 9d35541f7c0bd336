"""Groups for the tests of packing: few distinct tokens, so that beginnings, whole sequences and prompts repeat."""

from __future__ import annotations

from hypothesis import strategies as st

from ppcompile.runtime.groups import Group, Rollout, as_record
from ppcompile.runtime.packing.pool import Item

ROWS = st.lists(st.integers(0, 2), min_size=1, max_size=7)
GROUPS = st.builds(Group, ROWS, st.lists(ROWS, min_size=1, max_size=4))


def whole_rollout(ids: list[int]) -> Rollout:
    return Rollout(ids, [0] + [1] * (len(ids) - 1))


ROLLOUTS = st.lists(st.integers(0, 2), min_size=2, max_size=9).map(whole_rollout)
ENTRIES = st.lists(st.one_of(GROUPS, st.lists(ROLLOUTS, min_size=1, max_size=4)), min_size=1, max_size=14)


def items_of(entries) -> list[Item]:
    records = [as_record(entry, f"group {n}") for n, entry in enumerate(entries)]
    return [Item(record, n, range(record.num_sequences), record.num_sequences) for n, record in enumerate(records)]


def sequences_of(item: Item) -> list[tuple[int, ...]]:
    prompt = item.record.prompt.tolist()
    return [tuple(prompt + response.tolist()) for response in item.record.responses]


def stored_tokens(items, share: str) -> int:
    """Tokens of a pack of these items, by definition."""
    if share == "prompt":
        return sum(len(item.record.prompt) + sum(map(len, item.record.responses)) for item in items)
    sequences = [sequence for item in items for sequence in sequences_of(item)]
    return len({sequence[:n] for sequence in sequences for n in range(1, len(sequence) + 1)})
