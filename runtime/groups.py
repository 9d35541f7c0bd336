"""What users hand in, a :class:`Group` or a :class:`Rollout`, and the checked form of it, a :class:`Record`.

==================================================  ==========================================================
entry                                               meaning
==================================================  ==========================================================
``Group(prompt, responses)``, ``(prompt,            a prompt and one or more responses; every token of a response
responses)``, ``{"prompt":, "responses":}``         is scored
``Rollout(input_ids, completion_mask)``,            one whole sequence; the tokens that its mask names are scored
``{"input_ids":, "completion_mask":}``
a list or tuple of rollouts                         rollouts that belong together, such as a GRPO group: one group
==================================================  ==========================================================
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .prefixes import common_prefix

__all__ = ["Entry", "Group", "Record", "Rollout", "as_record", "flat_sequences", "record_of_rows"]

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]

_LARGEST_ID = 2**31 - 1


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


@dataclass(frozen=True, eq=False)
class Rollout:
    """One whole sequence, such as a conversation of many turns, and which of its tokens are scored.

    >>> turns = Rollout(input_ids=[5, 6, 7, 8, 9], completion_mask=[0, 1, 1, 0, 1])  # 6 7 and 9 are scored

    A scored token is predicted by the token before it *in this sequence*, so the first one cannot be scored.
    No prompt is named: what rollouts share is found. A list of rollouts is one group: it stays together,
    and with ``share="prompt"`` the beginning that all of them have in common is its prompt.

    Attributes:
        input_ids: row of ids, two or more.
        completion_mask: one entry a token, true (or 1) where the token is scored; at least one is.

    Kept as given; :func:`pack` checks it.
    """

    input_ids: Any
    completion_mask: Any


Entry = Group | Rollout | tuple[Any, Any] | Mapping[str, Any] | Sequence[Rollout]
"""What :func:`pack` and :func:`packs` take as one group."""


@dataclass(frozen=True, eq=False)
class Record:
    """A checked group: ``P`` tokens that all of its sequences begin with, and what follows in each.

    Attributes:
        prompt: int32 ``[P]``; empty only where rollouts have no beginning in common.
        responses: int32 arrays, none empty.
        masks: bool ``[P + length]`` for each response, its scored tokens; ``None``: all of every response, none of
            the prompt.
    """

    prompt: Ids
    responses: tuple[Ids, ...]
    masks: tuple[Mask, ...] | None = None

    @property
    def num_sequences(self) -> int:
        """Responses, or rollouts."""
        return len(self.responses)

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens with the prompt counted once."""
        return len(self.prompt) + sum(map(len, self.responses))

    @functools.cached_property
    def unpacked_tokens(self) -> int:
        """Tokens of all sequences, each with its own prompt."""
        return self.num_tokens + len(self.prompt) * (len(self.responses) - 1)

    @property
    def num_scored(self) -> int:
        """Scored tokens, one shared by several sequences counted for each."""
        if self.masks is None:
            return sum(map(len, self.responses))
        return sum(int(np.count_nonzero(mask)) for mask in self.masks)

    def part(self, indices: Sequence[int]) -> Record:
        """The record with these of its sequences only."""
        masks = None if self.masks is None else tuple(self.masks[n] for n in indices)
        return Record(self.prompt, tuple(self.responses[n] for n in indices), masks)


def flat_sequences(records: Iterable[Record]) -> tuple[Ids, NDArray[np.int64]]:
    """All whole sequences one after another, and their lengths: int32 ``[sum(lengths)]``, int64 ``[N]``."""
    pieces: list[Ids] = []
    lengths: list[int] = []
    for record in records:
        for response in record.responses:
            pieces += (record.prompt, response)
            lengths.append(len(record.prompt) + len(response))
    return np.concatenate(pieces), np.array(lengths, dtype=np.int64)


# --------------------------------------------------------------------------- checks


def as_record(entry: Any, where: str) -> Record:
    """Check one entry, and bring it into the one form that packing works on.

    Args:
        entry: see the table at the top.
        where: what to call it in messages, such as ``"group 3"``.

    Raises:
        TypeError, ValueError: what came in, where, what is accepted, and what to try.
    """
    if isinstance(entry, Group):
        return _group(entry.prompt, entry.responses, where)
    if isinstance(entry, Rollout):
        return _rollouts([entry], where)
    if isinstance(entry, Mapping):
        return _mapping(entry, where)
    if isinstance(entry, (list, tuple)) and entry and all(isinstance(part, Rollout) for part in entry):
        return _rollouts(entry, where)
    if isinstance(entry, tuple) and len(entry) == 2:
        return _group(*entry, where)
    size = f" of length {len(entry)}" if isinstance(entry, (tuple, list)) else ""
    raise TypeError(
        f"{where} is of type {type(entry).__name__}{size}; accepted: Group, a (prompt, responses) tuple, "
        "a dict {'prompt': ..., 'responses': ...}, Rollout, a dict {'input_ids': ..., 'completion_mask': ...}, "
        "or a list of Rollouts that belong together"
    )


def _mapping(entry: Mapping[str, Any], where: str) -> Record:
    if set(entry) == {"prompt", "responses"}:
        return _group(entry["prompt"], entry["responses"], where)
    if set(entry) == {"input_ids", "completion_mask"}:
        return _rollouts([Rollout(**entry)], where)
    raise ValueError(
        f"{where} is a dict with keys {sorted(map(str, entry))}; accepted: exactly 'prompt' and 'responses', or "
        "exactly 'input_ids' and 'completion_mask'. For a preference pair, pass responses=[chosen, rejected]"
    )


def _group(prompt: Any, responses: Any, where: str) -> Record:
    checked = _as_ids(prompt, f"prompt of {where}")
    if isinstance(responses, (str, bytes, Mapping)) or not isinstance(responses, Iterable):
        kind = type(responses).__name__
        raise TypeError(f"responses of {where} are of type {kind}; accepted: a list with one row of ids per response")
    rows = tuple(_as_ids(ids, f"response {r} of {where}") for r, ids in enumerate(responses))
    if not rows:
        raise ValueError(f"{where} has no responses; accepted: one or more. Leave out groups without any")
    return Record(checked, rows)


def _rollouts(rollouts: Sequence[Rollout], where: str) -> Record:
    names = [where] if len(rollouts) == 1 else [f"rollout {r} of {where}" for r in range(len(rollouts))]
    rows = [_as_ids(rollout.input_ids, f"input_ids of {name}") for rollout, name in zip(rollouts, names, strict=True)]
    masks = tuple(
        _as_mask(rollout.completion_mask, len(row), name)
        for rollout, row, name in zip(rollouts, rows, names, strict=True)
    )
    return record_of_rows(rows, masks)


def record_of_rows(rows: Sequence[Ids], masks: tuple[Mask, ...]) -> Record:
    """Whole sequences as a record: the beginning that all have in common is the prompt."""
    # One token of each stays outside, so that every sequence ends in a segment of its own, also where one rollout
    # begins another or equals it.
    shared = min([len(row) - 1 for row in rows] + [common_prefix(rows[0], row) for row in rows[1:]])
    return Record(rows[0][:shared], tuple(row[shared:] for row in rows), masks)


def _as_mask(values: Any, length: int, where: str) -> Mask:
    """A bool array ``[length]`` from what a user calls a completion mask."""
    accepted = "accepted: one 0 or 1 (or bool) per token of input_ids"
    mask = _as_array(values)
    if mask is None:
        raise TypeError(f"completion_mask of {where} is of type {type(values).__name__}; {accepted}")
    if mask.shape != (length,):
        raise ValueError(f"completion_mask of {where} has shape {list(mask.shape)}, input_ids [{length}]; {accepted}")
    if mask.dtype.kind not in "biu":
        raise TypeError(f"completion_mask of {where} holds {mask.dtype} values such as {mask[0]}; {accepted}")
    scored = mask.astype(bool)
    if mask.dtype.kind != "b" and (mask != scored).any():
        odd = int(np.argmax(mask != scored))
        raise ValueError(f"completion_mask of {where} holds {mask[odd]} at index {odd}; {accepted}")
    if scored[0]:
        raise ValueError(
            f"completion_mask of {where} scores the first token, which nothing predicts; accepted: 0 there. "
            "Try: begin the sequence with the tokenizer's BOS, or leave the first token out of the mask"
        )
    if not scored.any():
        raise ValueError(
            f"completion_mask of {where} scores no token, so the sequence would count for nothing; "
            "accepted: at least one 1. Leave out sequences without any"
        )
    return scored


def _as_ids(values: Any, where: str) -> Ids:
    """The row ``[length]`` from what a user calls token ids."""
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
    wide = ids.astype(np.int64, copy=False).view(np.uint64)  # a negative id is a very large one
    if wide.max() > _LARGEST_ID:
        odd = int(wide.argmax())
        raise ValueError(
            f"{where} holds {ids[odd]} at index {odd}; {accepted}. Try: drop label masks (-100) and padding first"
        )
    return ids.astype(np.int32, copy=False)


def _as_array(values: Any) -> np.ndarray | None:
    """A numpy view or copy of a row; ``None`` for what is not one."""
    if isinstance(values, np.ndarray):
        return values
    if isinstance(values, Tensor):
        # Some floating types are unknown to numpy, and any is refused by its caller.
        return (values.detach().double() if values.is_floating_point() else values).cpu().numpy()
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        return None
    try:
        return np.asarray(values)
    except ValueError:  # rows of different lengths
        return np.empty((len(values), 0))
