"""Packs: :func:`pack` turns groups of sequences into the tensors of one row.

Shapes: ``T`` slots (padding included), ``S`` segments, ``G`` groups, ``R`` responses (or rollouts) of all groups,
``M`` scored tokens, ``U`` unique scored slots (``U < M`` where responses share words).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .forest import Forest, forest_from_groups, forest_from_sequences
from .groups import Entry, Group, Record, Rollout, as_record, flat_sequences

__all__ = [
    "SHARE",
    "Group",
    "PackedBatch",
    "Rollout",
    "StepTotals",
    "check_int",
    "check_share",
    "forest_of",
    "pack",
    "pack_records",
]

Ids = NDArray[np.int64]

SHARE = ("prompt", "tree")
"""What :func:`pack` may store once: each group's prompt, or every common beginning within the pack."""

_ON_HOST = (
    "segments",
    "group_sizes",
    "group_index",
    "sequence_index",
)  # read by Python loops; on a device they would cost a wait each


@dataclass(frozen=True)
class StepTotals:
    """What one optimizer step holds over all ranks: the denominators of a loss that is a mean over the step.

    Packs hold different numbers of groups, so a mean over each pack would weigh them unequally. Sum instead, and divide
    by what the whole step holds; where gradients are averaged over ranks, as DDP and FSDP do, multiply by their number:

        (losses.sum() * world_size / batch.step.weight).backward()

    Attributes:
        index: which step of the epoch, from 0.
        packs: packs of the step, on all ranks.
        responses: sequences of the step, on all ranks.
        scored_tokens: their scored tokens.
        weight: sum of what ``packs(..., weight=)`` gave each group, such as its number of pairs.
    """

    index: int
    packs: int
    responses: int
    scored_tokens: int
    weight: float


@dataclass(frozen=True, eq=False, repr=False)
class PackedBatch:
    """One row of token ids with one or more groups, and the layout that keeps their sequences apart.

    Attributes:
        input_ids: int64 ``[1, T]``.
        position_ids: int64 ``[1, T]``, each slot's index in its unpacked sequences; 0 on padding.
        subtree_end: int64 ``[T]``; slot ``j`` is visible to ``i`` iff ``j <= i < subtree_end[j]``.
        segments: int64 ``[S, 4]``, always on the host: first slot, one past the last slot, ``subtree_end``, parent.
            Padding, if any, is the last one: a root that sees and is seen by nobody else.
        predecessors: int64 ``[U]``, the slot whose hidden state predicts each unique scored slot.
        targets: int64 ``[U]``, the token to predict there.
        scored_index: int64 ``[M]``, for each scored token (responses in input order, token by token) its row in
            ``predecessors`` and ``targets``. A token that two responses share appears once for each.
        response_index: int64 ``[M]``, the response of each scored token.
        lengths: int64 ``[R]``, scored tokens of each response: all of its tokens, or those that a rollout's mask names.
        last_slots: int64 ``[R]``, the slot of each response's last token.
        group_sizes: int64 ``[G]``, always on the host: responses of each group.
        group_index: int64 ``[G]``, always on the host: which of the inputs each group was.
        sequence_index: int64 ``[R]``, always on the host: which of its group's responses each was; not 0, 1, 2, ...
            only where a group is split over several packs.
        num_tokens: slots that hold tokens, padding aside: every token that is stored once counts once.
        unpacked_tokens: tokens of all sequences, each with its own prompt.
        max_position: largest entry of ``position_ids``.
        max_token_id: largest entry of ``input_ids``.
        step: totals of the optimizer step that the pack belongs to; ``None`` for a pack on its own.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    segments: Tensor
    predecessors: Tensor
    targets: Tensor
    scored_index: Tensor
    response_index: Tensor
    lengths: Tensor
    last_slots: Tensor
    group_sizes: Tensor
    group_index: Tensor
    sequence_index: Tensor
    num_tokens: int
    unpacked_tokens: int
    max_position: int
    max_token_id: int
    step: StepTotals | None = None

    @property
    def num_groups(self) -> int:
        """``G``."""
        return len(self.group_sizes)

    @property
    def num_responses(self) -> int:
        """``R``."""
        return len(self.lengths)

    @property
    def num_slots(self) -> int:
        """``T``, padding included."""
        return self.subtree_end.numel()

    @property
    def tokens_saved(self) -> int:
        """Tokens that unpacked sequences would have computed again."""
        return self.unpacked_tokens - self.num_tokens

    @property
    def device(self) -> torch.device:
        """Where the tensors are (what :meth:`to` leaves on the host aside)."""
        return self.input_ids.device

    @property
    def sequence_lengths(self) -> Tensor:
        """int64 ``[R]``, tokens of each whole sequence, the prompt included."""
        return self.position_ids[0, self.last_slots] + 1

    @property
    def scored_positions(self) -> Tensor:
        """int64 ``[M]``, where in its own sequence each scored token stands."""
        return self.position_ids[0, self.predecessors[self.scored_index]] + 1

    @property
    def prompt_lengths(self) -> Tensor:
        """int64 ``[R]``, tokens in front of each response: of a rollout, those before its first scored one."""
        return self.scored_positions[self.lengths.cumsum(0) - self.lengths]

    def group_of_response(self) -> Tensor:
        """int64 ``[R]``, the group of each response."""
        return torch.repeat_interleave(self.group_sizes).to(self.device)

    def sequence_slots(self) -> list[Ids]:
        """For each response, the slots of prompt + response in order: what its last token sees."""
        end = self.subtree_end.cpu().numpy()
        return [np.flatnonzero(end[: last + 1] > last) for last in self.last_slots.tolist()]

    def sequences(self) -> list[Ids]:
        """For each response, prompt + response read back from the layout alone: int64 arrays."""
        tokens = self.input_ids[0].cpu().numpy()
        return [tokens[slots] for slots in self.sequence_slots()]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedBatch:
        """A copy on ``device``; what lives on the host stays there."""
        target = torch.device(device)
        return self._map(lambda tensor: tensor.to(target, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """A copy in page-locked memory, from which ``.to(device, non_blocking=True)`` does not wait."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {k: move(v) for k, v in values.items() if isinstance(v, Tensor) and k not in _ON_HOST}
        return dataclasses.replace(self, **moved)

    def __len__(self) -> int:
        return self.num_groups

    def __repr__(self) -> str:
        return (
            f"PackedBatch({_count(self.num_groups, 'group')}, {_count(self.num_responses, 'response')}, "
            f"{_count(self.num_tokens, 'token')} in {_count(self.num_slots, 'slot')}, "
            f"{self.tokens_saved / self.unpacked_tokens:.0%} saved of {self.unpacked_tokens:,})"
        )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


# --------------------------------------------------------------------------- pack


def pack(
    groups: Iterable[Entry],
    *,
    share: str = "prompt",
    pad_to_multiple_of: int = 1,
    max_tokens: int | None = None,
    pad_token_id: int = 0,
) -> PackedBatch:
    """Write groups into one row in which shared beginnings stand once.

    >>> batch = pack([Group(prompt=[5, 6, 7], responses=[[8, 9], [8, 4, 3]])])
    >>> batch.input_ids.tolist(), batch.position_ids.tolist()
    ([[5, 6, 7, 8, 9, 8, 4, 3]], [[0, 1, 2, 3, 4, 3, 4, 5]])
    >>> batch
    PackedBatch(1 group, 2 responses, 8 tokens in 8 slots, 27% saved of 11)

    Args:
        groups: :class:`Group` objects, ``(prompt, responses)`` tuples, or dicts with these two keys; :class:`Rollout`
            objects, or dicts with their two keys, each a group of one sequence; lists of rollouts that belong together.
        share: ``"prompt"``: each group's prompt is stored once (of rollouts, the beginning that all of a group have
            in common). ``"tree"``: every common beginning in the pack is, also across groups and inside responses.
        pad_to_multiple_of: slots are filled up to a multiple of this.
        max_tokens: budget of the pack in tokens, padding aside.
        pad_token_id: the token on padding slots.

    Raises:
        TypeError: a group, or a row of ids, of a kind that is not accepted.
        ValueError: empty or negative ids, a mask that scores nothing or a first token, an unknown ``share``, or a pack
            beyond ``max_tokens``.
    """
    records = _checked_groups(groups)
    check_share(share)
    check_int("pad_to_multiple_of", pad_to_multiple_of, least=1)
    check_int("pad_token_id", pad_token_id, least=0)
    if max_tokens is not None:
        check_int("max_tokens", max_tokens, least=1)
    return pack_records(
        records, share=share, pad_to_multiple_of=pad_to_multiple_of, max_tokens=max_tokens, pad_token_id=pad_token_id
    )


def pack_records(
    records: Sequence[Record],
    *,
    share: str,
    pad_to_multiple_of: int,
    pad_token_id: int,
    max_tokens: int | None = None,
    group_index: Sequence[int] | None = None,
    sequence_index: Sequence[int] | None = None,
    step: StepTotals | None = None,
) -> PackedBatch:
    """:func:`pack` of what is checked already; the indices default to those of whole groups in input order.

    Raises:
        ValueError: a pack beyond ``max_tokens``.
    """
    forest = forest_of(records, share)
    if max_tokens is not None and forest.num_slots > max_tokens:
        raise ValueError(_beyond_budget(forest, records, max_tokens))
    sizes = [record.num_sequences for record in records]
    return _packed(
        forest,
        _scored_from_masks(forest, records),
        padding=-forest.num_slots % pad_to_multiple_of,
        pad_token_id=pad_token_id,
        group_sizes=sizes,
        group_index=range(len(records)) if group_index is None else group_index,
        sequence_index=[n for size in sizes for n in range(size)] if sequence_index is None else sequence_index,
        step=step,
    )


def forest_of(records: Sequence[Record], share: str) -> Forest:
    """The forest of a pack; ``share`` as in :func:`pack`."""
    if share == "prompt":
        return forest_from_groups((record.prompt, record.responses) for record in records)
    return forest_from_sequences(*flat_sequences(records))


def _packed(
    forest: Forest,
    scored: tuple[Ids, Ids],
    *,
    padding: int,
    pad_token_id: int,
    group_sizes: Sequence[int],
    group_index: Sequence[int],
    sequence_index: Sequence[int],
    step: StepTotals | None,
) -> PackedBatch:
    tokens, slots = forest.num_slots, forest.num_slots + padding
    scored_slots, lengths = scored
    is_scored = np.zeros(tokens, dtype=bool)
    is_scored[scored_slots] = True
    unique = np.flatnonzero(is_scored)
    filler = np.full(padding, pad_token_id, dtype=np.int64)
    # Padding is one root segment: each of its slots sees at least itself, so that no softmax is empty, and no
    # token sees it or is seen by it. Position 0 throughout, so that no table of positions is read past its end.
    segments = np.concatenate([forest.segments, [[tokens, slots, slots, -1]]]) if padding else forest.segments
    arrays = {
        "input_ids": np.concatenate([forest.tokens, filler])[None],
        "position_ids": np.concatenate([forest.positions, np.zeros_like(filler)])[None],
        "subtree_end": np.concatenate([forest.subtree_end, np.full_like(filler, slots)]),
        "segments": segments,
        "predecessors": _predecessors(forest)[unique],
        "targets": forest.tokens[unique],
        "scored_index": (np.cumsum(is_scored) - 1)[scored_slots],
        "response_index": np.repeat(np.arange(len(lengths)), lengths),
        "lengths": lengths,
        "last_slots": forest.slots(forest.lengths - 1),
        "group_sizes": np.array(group_sizes, dtype=np.int64),
        "group_index": np.array(group_index, dtype=np.int64),
        "sequence_index": np.array(sequence_index, dtype=np.int64),
    }
    return PackedBatch(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        num_tokens=tokens,
        unpacked_tokens=int(forest.lengths.sum()),
        max_position=int(forest.positions.max()),
        max_token_id=int(arrays["input_ids"].max()),
        step=step,
    )


def _scored_from_masks(forest: Forest, records: Sequence[Record]) -> tuple[Ids, Ids]:
    """The slot of each scored token, sequence by sequence, int64 ``[M]``; and how many each has, int64 ``[R]``."""
    if all(record.masks is None for record in records):
        lengths = np.array([len(row) for record in records for row in record.responses], dtype=np.int64)
        return forest.slots(forest.lengths - lengths), lengths
    masks = [mask for record in records for mask in _masks(record)]
    lengths = np.array([np.count_nonzero(mask) for mask in masks], dtype=np.int64)
    return forest.slots(np.zeros_like(forest.lengths))[np.concatenate(masks)], lengths


def _masks(record: Record) -> Sequence[NDArray[np.bool_]]:
    """bool, one entry a token of each whole sequence: the scored ones."""
    if record.masks is not None:
        return record.masks
    prompt = len(record.prompt)
    return [np.arange(prompt + len(response)) >= prompt for response in record.responses]


def _predecessors(forest: Forest) -> Ids:
    """The slot in front of each slot in its sequences, int64 ``[T]``; -1 in front of a root."""
    before = np.arange(-1, forest.num_slots - 1, dtype=np.int64)
    first, parent = forest.segments[:, 0], forest.segments[:, 3]
    before[first] = np.where(parent >= 0, forest.segments[parent, 1] - 1, -1)
    return before


def _beyond_budget(forest: Forest, records: Sequence[Record], max_tokens: int) -> str:
    g, before, total = _first_beyond(forest, records, max_tokens)
    responses = records[g].responses
    sizes = ", ".join(str(len(r)) for r in responses[:8]) + ", ..." * (len(responses) > 8)
    return (
        f"group {g} (prompt {len(records[g].prompt):,}, responses {sizes}: {total - before:,} tokens) does not fit: "
        f"{before:,} of max_tokens={max_tokens:,} are taken, and all {_count(len(records), 'group')} need "
        f"{forest.num_slots:,}. Nothing was dropped or cut. Try: raise max_tokens, or "
        + ("move groups to another pack" if before else "shorten or split this group")
    )


def _first_beyond(forest: Forest, records: Sequence[Record], max_tokens: int) -> tuple[int, int, int]:
    """First group beyond the budget, and the tokens without and with it (what groups share counts once)."""
    rows = iter(np.split(forest.slots(np.zeros_like(forest.lengths)), np.cumsum(forest.lengths)[:-1]))
    seen = np.zeros(forest.num_slots, dtype=bool)
    before = 0
    for g, record in enumerate(records):
        for _ in record.responses:
            seen[next(rows)] = True
        total = int(seen.sum())
        if total > max_tokens:
            return g, before, total
        before = total
    raise AssertionError("called only for a forest beyond the budget")


# --------------------------------------------------------------------------- what is checked


def _checked_groups(groups: Iterable[Any]) -> list[Record]:
    if isinstance(groups, (Group, Rollout, Mapping, str)) or not isinstance(groups, Iterable):
        raise TypeError(f"pack() takes a list of groups, got one {type(groups).__name__}; wrap it in a list")
    checked = [as_record(value, f"group {g}") for g, value in enumerate(groups)]
    if not checked:
        raise ValueError("pack() got no groups; a pack holds at least one")
    return checked


def check_share(share: str) -> None:
    """Raise ``ValueError`` unless ``share`` is one of :data:`SHARE`."""
    if share not in SHARE:
        raise ValueError(f"share={share!r} is unknown; accepted: {', '.join(map(repr, SHARE))}")


def check_int(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
