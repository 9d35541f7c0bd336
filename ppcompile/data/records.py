"""One preference record: a raw row in any accepted spelling, checked, or refused with the reason.

==========================================  =======================================================================
``prompt chosen rejected``                  text; or messages ``{"role", "content"}``; a reply may be text under a
                                            conversational prompt
``chosen rejected``                         two conversations; the messages they share at the start are the prompt
``prompt responses [scores]``               any number of replies; a higher score is better
``conversations [system] chosen rejected``  messages spelled ``{"from", "value"}``
==========================================  =======================================================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["BadRecord", "Message", "Pairs", "Preference", "Prompt", "parse_json", "preference_from"]

Message = dict[str, Any]
Prompt = str | list[Message]
Pairs = tuple[tuple[int, int], ...]

ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
"""Role names of the ``{"from", "value"}`` spelling that differ from the usual ones."""

ACCEPTED = "prompt+chosen+rejected, chosen+rejected, prompt+responses[+scores], conversations+chosen+rejected"


class BadRecord(ValueError):
    """A record that cannot be used; ``where`` it stands and the ``reason`` why."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


@dataclass(frozen=True)
class Preference:
    """A prompt, its responses, and which of them are preferred.

    Attributes:
        prompt: text, or chat messages.
        responses: the text of each response.
        pairs: ``(winner, loser)`` indices into ``responses``; empty where nothing is strictly preferred.
        where: file and line (or data set and row) of the record, for messages.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    pairs: Pairs
    where: str


def preference_from(raw: Any, where: str, unscored: str) -> Preference:
    """Read one raw record, by the columns it has.

    Args:
        raw: a mapping of columns, or a line of JSON.
        where: words that locate the record.
        unscored: ``"undecided"`` or ``"best-first"``, what ``responses`` without ``scores`` mean.

    Raises:
        BadRecord: see :func:`ppcompile.data.read_preferences`.
    """
    row = parse_json(raw, where) if isinstance(raw, str) else raw
    if not isinstance(row, Mapping):
        raise BadRecord(where, f"a record must be an object with columns, got {type(row).__name__}")
    columns = {name: value for name, value in row.items() if value is not None}  # tables fill absent columns with null
    try:
        if "responses" in columns:
            prompt, responses = _prompt(_column(columns, "prompt")), _responses(columns["responses"])
            pairs = _scored_pairs(columns.get("scores"), len(responses), unscored)
        else:
            prompt, responses = _chosen_and_rejected(columns)
            pairs = ((0, 1),) if responses[0] != responses[1] else ()
    except _Reason as reason:
        raise BadRecord(where, str(reason)) from None
    return Preference(prompt, responses, pairs, where)


def parse_json(text: str, where: str) -> Any:
    """``json.loads`` with the place in the message.

    Raises:
        BadRecord: not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord(where, f"not JSON: {error}") from error


class _Reason(Exception):
    """Why a record is bad; raised short inside, given its place once outside."""


def _column(columns: Mapping[str, Any], name: str) -> Any:
    if name not in columns:
        raise _Reason(
            f"column {name!r} is missing (found: {', '.join(map(str, columns)) or 'none'}); accepted: {ACCEPTED}"
        )
    return columns[name]


def _chosen_and_rejected(columns: Mapping[str, Any]) -> tuple[Prompt, tuple[str, ...]]:
    chosen, rejected = _column(columns, "chosen"), _column(columns, "rejected")
    given: Prompt | None = None
    if "conversations" in columns:
        given = _prompt([*_system(columns), *_as_list(columns["conversations"], "conversations")])
    elif "prompt" in columns:
        given = _prompt(columns["prompt"])
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(given, list):
        # Some data sets repeat the last user message as a text column beside two full conversations.
        prompt, tails = _split_conversations(_messages(chosen, "chosen"), _messages(rejected, "rejected"))
        return prompt, (_reply(tails[0], "chosen", prompt), _reply(tails[1], "rejected", prompt))
    if given is None:
        raise _Reason(
            "column 'prompt' is missing, and without it 'chosen' and 'rejected' must be conversations: "
            "where the prompt ends inside plain text is a guess"
        )
    return given, (_reply(chosen, "chosen", given), _reply(rejected, "rejected", given))


def _as_list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Reason(f"{name!r} must be a list, got {type(value).__name__}")
    return value


def _system(columns: Mapping[str, Any]) -> list[Message]:
    return [{"role": "system", "content": columns["system"]}] if columns.get("system") else []


def _split_conversations(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], tuple[list[Message], ...]]:
    """The messages both start with are the prompt; what follows are the responses."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise _Reason("'chosen' and 'rejected' share no first message, so there is no prompt")
    if shared == len(chosen) or shared == len(rejected):
        raise _Reason("'chosen' and 'rejected' are the same conversation, or one begins with all of the other")
    return chosen[:shared], (chosen[shared:], rejected[shared:])


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return _text(value, "prompt")
    messages = _messages(_as_list(value, "prompt"), "prompt")
    if not messages:
        raise _Reason("'prompt' holds no message")
    return messages


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Reason(f"{name!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise _Reason(f"{name!r} is empty")
    return value


def _messages(values: list[Any], name: str) -> list[Message]:
    return [_message(value, f"{name}[{index}]") for index, value in enumerate(values)]


def _message(value: Any, name: str) -> Message:
    """A message with ``role`` and ``content``; other keys are kept for the chat template, nulls are not."""
    if not isinstance(value, Mapping):
        raise _Reason(f"{name!r} must be a message with 'role' and 'content', got {type(value).__name__}")
    message = {key: item for key, item in value.items() if item is not None}
    if "from" in message and "value" in message:
        message = {"role": ROLES.get(message["from"], message["from"]), "content": message["value"]}
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise _Reason(f"{name!r} needs a text {key!r}, got {type(message.get(key)).__name__}")
    return message


def _reply(value: Any, name: str, prompt: Prompt) -> str:
    """The text of a response: text itself, a message, or a list with one message of the assistant."""
    if isinstance(value, str):
        return _text(value, name)
    messages = _messages(value if isinstance(value, list) else [value], name)
    if isinstance(prompt, list) and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if len(messages) != 1:
        raise _Reason(
            f"{name!r} must be one message after the prompt, got {len(messages)}; move what both share to 'prompt'"
        )
    message = messages[0]
    if message["role"] != "assistant" or set(message) != {"role", "content"}:
        raise _Reason(
            f"{name!r} must be an assistant message of 'role' and 'content', got {message['role']!r}, "
            f"keys {', '.join(message)}"
        )
    return _text(message["content"], name)


def _responses(values: Any) -> tuple[str, ...]:
    responses = tuple(_text(value, f"responses[{n}]") for n, value in enumerate(_as_list(values, "responses")))
    if len(responses) < 2:
        raise _Reason(f"a preference needs at least two responses, got {len(responses)}")
    return responses


def _scored_pairs(scores: Any, count: int, unscored: str) -> Pairs:
    if scores is None:
        scores = list(range(count, 0, -1)) if unscored == "best-first" else [0] * count
    if len(_as_list(scores, "scores")) != count:
        raise _Reason(f"{count} responses but {len(scores)} scores")
    for n, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise _Reason(f"'scores[{n}]' must be a finite number, got {score!r}")
    best = max(range(count), key=scores.__getitem__)
    return tuple((best, n) for n in range(count) if scores[n] < scores[best])
