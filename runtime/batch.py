"""Groups, and packs of them: :func:`pack` turns prompts with responses into the tensors of one row.

Shapes: ``T`` slots (padding included), ``S`` segments, ``G`` groups, ``R`` responses of all groups, ``M``
scored tokens (the sum of the response lengths), ``U`` unique scored slots (``U < M`` where responses share
words).
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

__all__ = ["SHARE", "Group", "PackedBatch", "as_group", "pack"]

Ids = NDArray[np.int64]

SHARE = ("prompt", "tree")
"""What :func:`pack` may store once: each group's prompt, or every common beginning within the pack."""

_ON_HOST = ("segments", "group_sizes")  # read by Python loops; on a device they would cost a wait each


@dataclass(frozen=True, eq=False)
class Group:
    """A prompt and its responses, as token ids.

    Attributes:
        prompt: non-empty row of ids: a sequence of ints, or a 1-d integer tensor or array.
        responses: one or more such rows.

    Kept as given; :func:`pack` checks it, where the group's place in the pack is known.
    """

    prompt: Any
    responses: Sequence[Any]

    @property
    def num_tokens(self) -> int:
        """Tokens of the group with its prompt counted once."""
        return len(self.prompt) + sum(len(response) for response in self.responses)

    @property
    def unpacked_tokens(self) -> int:
        """Tokens of the group as separate sequences, the prompt repeated for each response."""
        return self.num_tokens + len(self.prompt) * (len(self.responses) - 1)


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
        lengths: int64 ``[R]``, tokens of each response.
        last_slots: int64 ``[R]``, the slot of each response's last token.
        group_sizes: int64 ``[G]``, always on the host: responses of each group.
        num_tokens: slots that hold tokens, padding aside.
        unpacked_tokens: tokens of all sequences, each with its own prompt.
        max_position: largest entry of ``position_ids``.
        max_token_id: largest entry of ``input_ids``.
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
    num_tokens: int
    unpacked_tokens: int
    max_position: int
    max_token_id: int

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
        """Where the tensors are (``segments`` and ``group_sizes`` stay on the host)."""
        return self.input_ids.device

    @property
    def prompt_lengths(self) -> Tensor:
        """int64 ``[R]``, tokens of the prompt in front of each response."""
        return self.position_ids[0, self.last_slots] + 1 - self.lengths

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
        moved = {k: move(v) for k, v in values.items() if isinstance(v, Tensor) and k not in _ON_HOST}
        return PackedBatch(**{**values, **moved})

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
    groups: Iterable[Group | tuple[Any, Sequence[Any]] | Mapping[str, Any]],
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
        groups: :class:`Group` objects, ``(prompt, responses)`` tuples, or dicts with these two keys.
        share: ``"prompt"``: each group's prompt is stored once. ``"tree"``: every common beginning in
            the pack is, also across groups and inside responses.
        pad_to_multiple_of: slots are filled up to a multiple of this.
        max_tokens: budget of the pack in tokens, padding aside.
        pad_token_id: the token on padding slots.

    Raises:
        TypeError: a group, or a row of ids, of a kind that is not accepted.
        ValueError: empty or negative ids, an unknown ``share``, or a pack beyond ``max_tokens``.
    """
    checked = _checked_groups(groups)
    if share not in SHARE:
        raise ValueError(f"share={share!r} is unknown; accepted: {', '.join(map(repr, SHARE))}")
    _check_int("pad_to_multiple_of", pad_to_multiple_of, least=1)
    _check_int("pad_token_id", pad_token_id, least=0)
    forest = _forest(checked, share)
    if max_tokens is not None:
        _check_int("max_tokens", max_tokens, least=1)
        _check_budget(forest, checked, max_tokens)
    return _packed(forest, checked, -forest.num_slots % pad_to_multiple_of, pad_token_id)


Checked = list[tuple[Ids, list[Ids]]]


def _forest(groups: Checked, share: str) -> Forest:
    if share == "prompt":
        return forest_from_groups(groups)
    return forest_from_sequences(np.concatenate([p, r]) for p, responses in groups for r in responses)


def _packed(forest: Forest, groups: Checked, padding: int, pad_token_id: int) -> PackedBatch:
    tokens, slots = forest.num_slots, forest.num_slots + padding
    lengths = np.array([len(r) for _, responses in groups for r in responses], dtype=np.int64)
    scored = _scored_slots(forest, lengths)
    is_scored = np.zeros(tokens, dtype=bool)
    is_scored[scored] = True
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
        "scored_index": (np.cumsum(is_scored) - 1)[scored],
        "response_index": np.repeat(np.arange(len(lengths)), lengths),
        "lengths": lengths,
        "last_slots": scored[np.cumsum(lengths) - 1],
        "group_sizes": np.array([len(responses) for _, responses in groups], dtype=np.int64),
    }
    return PackedBatch(
        **{name: torch.from_numpy(array) for name, array in arrays.items()},
        num_tokens=tokens,
        unpacked_tokens=int(forest.lengths.sum()),
        max_position=int(forest.positions.max()),
        max_token_id=int(arrays["input_ids"].max()),
    )


def _scored_slots(forest: Forest, lengths: Ids) -> Ids:
    """The slot of each scored token, int64 ``[M]``: responses in input order, token by token."""
    starts = (forest.lengths - lengths).tolist()
    return np.concatenate([forest.sequence_slots(n, start) for n, start in enumerate(starts)])


def _predecessors(forest: Forest) -> Ids:
    """The slot in front of each slot in its sequences, int64 ``[T]``; -1 in front of a root."""
    before = np.arange(-1, forest.num_slots - 1, dtype=np.int64)
    first, parent = forest.segments[:, 0], forest.segments[:, 3]
    before[first] = np.where(parent >= 0, forest.segments[parent, 1] - 1, -1)
    return before


def _check_budget(forest: Forest, groups: Checked, max_tokens: int) -> None:
    if forest.num_slots <= max_tokens:
        return
    g, before, total = _first_beyond(forest, groups, max_tokens)
    prompt, responses = groups[g]
    sizes = ", ".join(str(len(r)) for r in responses[:8]) + ", ..." * (len(responses) > 8)
    raise ValueError(
        f"group {g} (prompt {len(prompt):,}, responses {sizes}: {total - before:,} tokens) does not fit: "
        f"{before:,} of max_tokens={max_tokens:,} are taken, and all {_count(len(groups), 'group')} need "
        f"{forest.num_slots:,}. Nothing was dropped or cut. Try: raise max_tokens, or "
        + ("move groups to another pack" if before else "shorten or split this group")
    )


def _first_beyond(forest: Forest, groups: Checked, max_tokens: int) -> tuple[int, int, int]:
    """First group beyond the budget, and the tokens without and with it (what groups share counts once)."""
    seen = np.zeros(forest.num_slots, dtype=bool)
    n = before = 0
    for g, (_, responses) in enumerate(groups):
        for _ in responses:
            seen[forest.sequence_slots(n)] = True
            n += 1
        total = int(seen.sum())
        if total > max_tokens:
            return g, before, total
        before = total
    raise AssertionError("called only for a forest beyond the budget")


# --------------------------------------------------------------------------- what users hand in


def as_group(value: Any, where: str = "group") -> Group:
    """A :class:`Group` from one, from ``(prompt, responses)``, or from a dict with these two keys."""
    if isinstance(value, Group):
        return value
    if isinstance(value, tuple) and len(value) == 2:
        return Group(*value)
    if isinstance(value, Mapping):
        if set(value) == {"prompt", "responses"}:
            return Group(**value)
        raise ValueError(
            f"{where} is a dict with keys {sorted(map(str, value))}; accepted: exactly 'prompt' and 'responses'. "
            "For a preference pair, pass responses=[chosen, rejected]"
        )
    size = f" of length {len(value)}" if isinstance(value, (tuple, list)) else ""
    raise TypeError(
        f"{where} is of type {type(value).__name__}{size}; accepted: Group, a (prompt, responses) tuple, "
        "or a dict {'prompt': ..., 'responses': ...}"
    )


def _checked_groups(groups: Iterable[Any]) -> Checked:
    if isinstance(groups, (Group, Mapping, str)) or not isinstance(groups, Iterable):
        raise TypeError(f"pack() takes a list of groups, got one {type(groups).__name__}; wrap it in a list")
    checked = [_checked(as_group(value, f"group {g}"), g) for g, value in enumerate(groups)]
    if not checked:
        raise ValueError("pack() got no groups; a pack holds at least one")
    return checked


def _checked(group: Group, g: int) -> tuple[Ids, list[Ids]]:
    prompt = _as_ids(group.prompt, f"prompt of group {g}")
    if isinstance(group.responses, (str, bytes, Mapping)) or not isinstance(group.responses, Iterable):
        kind = type(group.responses).__name__
        raise TypeError(f"responses of group {g} are of type {kind}; accepted: a list with one row of ids per response")
    responses = [_as_ids(ids, f"response {r} of group {g}") for r, ids in enumerate(group.responses)]
    if not responses:
        raise ValueError(f"group {g} has no responses; accepted: one or more. Leave out groups without any")
    return prompt, responses


def _as_ids(values: Any, where: str) -> Ids:
    """int64 ``[length]`` from what a user calls token ids."""
    accepted = "accepted: a non-empty row of non-negative ints (list, 1-d integer tensor or array)"
    ids = _as_array(values)
    if ids is None:
        hint = ". Try: responses=[[...]], a list of rows, even for one response" if isinstance(values, int) else ""
        raise TypeError(f"{where} is of type {type(values).__name__}; {accepted}{hint}")
    if ids.ndim != 1:
        hint = "drop the batch dimension with x[0]" if ids.ndim == 2 and len(ids) == 1 else "pass one row at a time"
        raise ValueError(f"{where} is nested: shape {list(ids.shape)}; {accepted}. Try: {hint}")
    if not ids.size:
        raise ValueError(f"{where} is empty; {accepted}. Try: begin it with the tokenizer's BOS, or end it with EOS")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{where} holds {ids.dtype} values such as {ids[0]}; {accepted}. Try: tokenize it first")
    ids = ids.astype(np.int64, copy=False)
    low = int(ids.argmin())
    if ids[low] < 0:
        raise ValueError(
            f"{where} holds {ids[low]} at index {low}; {accepted}. Try: drop label masks (-100) and padding first"
        )
    return ids


def _as_array(values: Any) -> np.ndarray | None:
    """A numpy view or copy of a row; ``None`` for what is not one."""
    if isinstance(values, Tensor):
        # Some floating types are unknown to numpy, and any is refused by its caller.
        return (values.detach().double() if values.is_floating_point() else values).cpu().numpy()
    if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)):
        return None
    try:
        return np.asarray(values)
    except ValueError:  # rows of different lengths
        return np.empty((len(values), 0))


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
