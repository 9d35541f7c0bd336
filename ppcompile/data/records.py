"""One record: a raw row in any accepted spelling, checked, or refused with the reason.

==========================================  =======================================================================
``prompt chosen rejected``                  text; or messages ``{"role", "content"}``; a reply may be text under a
                                            conversational prompt
``chosen rejected``                         two conversations; the messages they share at the start are the prompt
``conversations [system] chosen rejected``  messages spelled ``{"from", "value"}``
``prompt responses [scores]``               any number of replies; a higher score is better; also spelled
                                            ``completions``
``prompt completion [label]``               one reply, wanted or not
``messages``                                one conversation; also spelled ``conversations [system]``
``conversations [scores]``                  rollouts: a list of conversations that begin alike
==========================================  =======================================================================

A reply is text, one message, or the messages that follow the prompt: then those of the assistant are scored and the
others (tool results, the user's next turn) are not. In a whole conversation the prompt ends where the assistant first
speaks. A ``tools`` column (JSON schemas, or their JSON text) goes with any conversation. Other columns are not read, so
a ``messages`` column beside ``chosen`` and ``rejected``, as some data sets have, does nothing; only images, sounds and
videos, without which the text would mean something else, are refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ppcompile.data.messages import Message, Reason, Response, as_list, as_messages, as_text, as_tools, shared_messages

__all__ = [
    "BadRecord",
    "OneSchema",
    "Pairs",
    "Preference",
    "Prompt",
    "check_all_is_text",
    "parse_json",
    "preference_from",
]

Prompt = str | list[Message]
Pairs = tuple[tuple[int, int], ...]
Columns = Mapping[str, Any]
Content = tuple[Prompt, list[Response]]


ON_BAD = ("error", "skip")
"""What a bad record does: it stops the run, or it is left out and counted."""

UNSCORED = ("undecided", "best-first")
"""What responses without scores mean: no preference, or listed with the best one first."""


def one_of(name: str, value: str, accepted: tuple[str, ...]) -> str:
    """``value``, if it is one of those that an option takes.

    Raises:
        ValueError: it is not.
    """
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is not accepted; take one of {', '.join(map(repr, accepted))}")
    return value


class BadRecord(ValueError):
    """A record that cannot be used; ``where`` it stands and the ``reason`` why."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles, so that a worker process can send it."""
        return BadRecord, (self.where, self.reason)


@dataclass(frozen=True)
class Preference:
    """A prompt, its responses, and which of them are preferred.

    Attributes:
        prompt: text, or chat messages.
        responses: for each response its text (under messages: the content of one assistant message), or the messages
            that follow the prompt, of which those of the assistant are scored.
        pairs: ``(winner, loser)`` indices into ``responses``; empty where nothing is strictly preferred.
        where: file and line (or data set and row) of the record, for messages.
        scores: one for each response, higher is better; ``None`` where the record has none.
        tools: JSON schemas for the chat template.
        spelling: the row of the table above that the record was read as.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    pairs: Pairs
    where: str
    scores: tuple[float, ...] | None = None
    tools: list[dict[str, Any]] | None = None
    spelling: str = field(default="", compare=False)

    @property
    def comparable(self) -> bool:
        """Whether one response could be preferred to another: a single conversation or completion has no other."""
        return self.spelling not in (COMPLETION, MESSAGES)

    @property
    def schema(self) -> str:
        """Spelling, and whether the record is text or a conversation: one for all records of a data set."""
        return f"{self.spelling} of {'text' if isinstance(self.prompt, str) else 'messages'}"


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
        check_all_is_text(columns)
        spelling = _spelling(columns)
        prompt, responses = READERS[spelling](columns)
        tools = as_tools(columns.get("tools", []), isinstance(prompt, list))
        scores = _scores(columns, spelling, len(responses))
    except Reason as reason:
        raise BadRecord(where, str(reason)) from None
    if spelling == PAIR:
        pairs: Pairs = ((0, 1),) if responses[0] != responses[1] else ()
    else:
        pairs = pairs_of_scores(scores, len(responses), unscored)
    return Preference(prompt, tuple(responses), pairs, where, scores, tools, spelling)


class Spelled(Protocol):
    """A record that says how it was spelled, and where it stands."""

    @property
    def schema(self) -> str: ...
    @property
    def where(self) -> str: ...


class OneSchema:
    """Holds all records of a data set to the schema of the first: a mixture is two data sets, or a mistake."""

    def __init__(self) -> None:
        self._first: Spelled | None = None

    def check(self, record: Spelled) -> None:
        """Refuse a record that reads otherwise than the first one.

        Raises:
            BadRecord: it does.
        """
        first = self._first = self._first or record
        if record.schema != first.schema:
            raise BadRecord(
                record.where,
                f"mixed schemas: this record is {record.schema}, and the first one ({first.where}) is {first.schema}",
            )


def parse_json(text: str, where: str) -> Any:
    """``json.loads`` with the place in the message.

    Raises:
        BadRecord: not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord(where, f"not JSON: {error}") from error


# --------------------------------------------------------------------------- spellings

_NOT_TEXT = ("image", "images", "pixel_values", "audio", "audios", "video", "videos")


def check_all_is_text(columns: Columns) -> None:
    """Refuse what would be trained on without the pictures that it speaks of.

    Raises:
        Reason: a column of images, sounds or videos that holds any.
    """
    for name in _NOT_TEXT:
        value = columns.get(name)
        if value is not None and not (isinstance(value, (str, list, tuple)) and not value):
            raise Reason(f"column {name!r} is not read: packs hold text. Try: remove the column to train on text alone")


PAIR, RESPONSES, COMPLETION = "prompt+chosen+rejected", "prompt+responses", "prompt+completion"
MESSAGES, ROLLOUTS = "messages", "conversations"

ACCEPTED = (
    "prompt+chosen+rejected, chosen+rejected, conversations+chosen+rejected, prompt+responses[+scores], "
    "prompt+completion[+label], messages, conversations[+scores]"
)


def _spelling(columns: Columns) -> str:
    """Which row of the table the columns are, ``READERS``'s key.

    Raises:
        Reason: none of them, or two that say different things about what the responses are.
    """
    pair = "chosen" in columns or "rejected" in columns
    named = [name for name in ("responses", "completions", "completion") if name in columns]
    if len(named) + pair > 1:
        found = [*(["chosen+rejected"] if pair else []), *named]
        raise Reason(f"columns {' and '.join(found)} both say what the responses are; keep one; accepted: {ACCEPTED}")
    if pair:
        return PAIR
    if named:
        return COMPLETION if named == ["completion"] else RESPONSES
    if "messages" in columns:
        return MESSAGES
    if "conversations" in columns:
        first = next(iter(as_list(columns["conversations"], "conversations")), None)
        return ROLLOUTS if isinstance(first, list) else MESSAGES
    found_names = ", ".join(map(str, columns)) or "none"
    raise Reason(f"no column says what the responses are (found: {found_names}); accepted: {ACCEPTED}")


def _column(columns: Columns, name: str) -> Any:
    if name not in columns:
        raise Reason(
            f"column {name!r} is missing (found: {', '.join(map(str, columns)) or 'none'}); accepted: {ACCEPTED}"
        )
    return columns[name]


def _pair(columns: Columns) -> Content:
    chosen, rejected = _column(columns, "chosen"), _column(columns, "rejected")
    given: Prompt | None = None
    if "conversations" in columns:
        given = _conversation(columns, "conversations")
    elif "prompt" in columns:
        given = _prompt(columns["prompt"])
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(given, list):
        # Some data sets repeat the last user message as a text column beside two full conversations.
        return _split_conversations(as_messages(chosen, "chosen"), as_messages(rejected, "rejected"))
    if given is None:
        raise Reason(
            "column 'prompt' is missing, and without it 'chosen' and 'rejected' must be conversations: where the "
            "prompt ends inside plain text is a guess; add a 'prompt' column, and leave its text out of the other two"
        )
    return given, [_reply(chosen, "chosen", given), _reply(rejected, "rejected", given)]


def _several(columns: Columns) -> Content:
    name = "responses" if "responses" in columns else "completions"
    if name == "completions" and "labels" in columns:
        raise Reason("'completions' with 'labels' are the steps of one response (stepwise supervision), not responses")
    prompt = _prompt(_column(columns, "prompt"))
    values = as_list(columns[name], name)
    responses = [_reply(value, f"{name}[{n}]", prompt) for n, value in enumerate(values)]
    if len(responses) < 2:
        raise Reason(f"a preference needs at least two responses, got {len(responses)}")
    return prompt, responses


def _one(columns: Columns) -> Content:
    prompt = _prompt(_column(columns, "prompt"))
    return prompt, [_reply(columns["completion"], "completion", prompt)]


def _whole(columns: Columns) -> Content:
    name = "messages" if "messages" in columns else "conversations"
    messages = _conversation(columns, name)
    start = _first_assistant(messages, name)
    if start == 0:
        raise Reason(f"{name!r} begins with the assistant, so there is no prompt")
    return messages[:start], [_short(messages[start:])]


def _rollouts(columns: Columns) -> Content:
    values = as_list(columns["conversations"], "conversations")
    rollouts = [as_messages(value, f"conversations[{n}]") for n, value in enumerate(values)]
    first_turns = [_first_assistant(rollout, f"conversations[{n}]") for n, rollout in enumerate(rollouts)]
    start = min([shared_messages(rollouts), *first_turns])
    if start == 0:
        raise Reason("'conversations' share no first message before the assistant speaks, so there is no prompt")
    return rollouts[0][:start], [_short(rollout[start:]) for rollout in rollouts]


READERS: dict[str, Callable[[Columns], Content]] = {
    PAIR: _pair,
    RESPONSES: _several,
    COMPLETION: _one,
    MESSAGES: _whole,
    ROLLOUTS: _rollouts,
}


# --------------------------------------------------------------------------- prompts and replies


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return as_text(value, "prompt")
    messages = as_messages(value, "prompt")
    if not messages:
        raise Reason("'prompt' holds no message")
    return messages


def _conversation(columns: Columns, name: str) -> list[Message]:
    """The messages of a column, with those of a ``system`` column in front."""
    system = [{"role": "system", "content": columns["system"]}] if columns.get("system") else []
    messages = as_messages([*system, *as_list(columns[name], name)], name)
    if len(messages) == len(system):
        raise Reason(f"{name!r} holds no message")
    return messages


def _first_assistant(messages: list[Message], name: str) -> int:
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            return index
    raise Reason(f"{name!r} holds no message of the assistant, so nothing is scored")


def _split_conversations(chosen: list[Message], rejected: list[Message]) -> Content:
    """The messages both start with are the prompt; what follows are the responses."""
    shared = shared_messages([chosen, rejected])
    if shared == 0:
        raise Reason("'chosen' and 'rejected' share no first message, so there is no prompt")
    if shared == len(chosen) or shared == len(rejected):
        raise Reason("'chosen' and 'rejected' are the same conversation, or one begins with all of the other")
    tails = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    return chosen[:shared], [_following(messages, name) for name, messages in tails.items()]


def _reply(value: Any, name: str, prompt: Prompt) -> Response:
    """A response: its text, one message, or the messages after the prompt, which they may repeat."""
    if isinstance(value, str):
        return as_text(value, name)
    messages = as_messages(value if isinstance(value, list) else [value], name)
    if isinstance(prompt, list) and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    reply = _following(messages, name)
    if isinstance(prompt, str) and not isinstance(reply, str):
        raise Reason(f"{name!r} must be text or one assistant message under a prompt that is text; make both messages")
    return reply


def _following(messages: list[Message], name: str) -> Response:
    if not messages:
        raise Reason(f"{name!r} holds no message after the prompt")
    _first_assistant(messages, name)
    return _short(messages)


def _short(messages: list[Message]) -> Response:
    """One plain message of the assistant is its text; all else stays as it is."""
    if len(messages) == 1 and set(messages[0]) == {"role", "content"}:
        content: str = messages[0]["content"]
        return content
    return messages


# --------------------------------------------------------------------------- scores


def _scores(columns: Columns, spelling: str, count: int) -> tuple[float, ...] | None:
    if spelling == COMPLETION and "label" in columns:
        if not isinstance(columns["label"], bool):
            raise Reason(f"'label' must be true (wanted) or false, got {columns['label']!r}")
        return (float(columns["label"]),)
    return read_scores(columns.get("scores"), count) if spelling in (RESPONSES, ROLLOUTS) else None


def read_scores(value: Any, count: int) -> tuple[float, ...] | None:
    """A column of finite numbers, one for each response; ``None`` where there is none.

    Raises:
        Reason: it is something else.
    """
    if value is None:
        return None
    scores = as_list(value, "scores")
    if len(scores) != count:
        raise Reason(f"{count} responses but {len(scores)} scores")
    for n, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) <= sys.float_info.max:
            raise Reason(f"'scores[{n}]' must be a finite number, got {score!r}")
    return tuple(map(float, scores))


def pairs_of_scores(scores: Sequence[float] | None, count: int, unscored: str) -> Pairs:
    """The best response (the first of several equally good ones) wins against each strictly worse one."""
    if scores is None:
        if unscored != "best-first":
            return ()
        scores = range(count, 0, -1)
    best = max(range(len(scores)), key=scores.__getitem__)
    return tuple((best, n) for n in range(len(scores)) if scores[n] < scores[best])
