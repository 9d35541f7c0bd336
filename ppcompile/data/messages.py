"""Chat messages: every spelling brought to ``{"role", "content"}``, or refused with the reason.

Two spellings are read, ``{"role", "content"}`` and ``{"from", "value"}``. Other keys (``tool_calls``, ``name``,
``reasoning_content``, ...) are kept for the chat template; those whose value is null are not, since tables fill absent
keys with it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Message", "Reason", "Response", "as_list", "as_messages", "as_text", "as_tools", "shared_messages"]

Message = dict[str, Any]
Response = str | list[Message]
"""What follows a prompt: the text of one assistant message, or messages of which those of the assistant are scored."""

ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
"""Role names of the ``{"from", "value"}`` spelling that differ from the usual ones."""


class Reason(Exception):
    """Why a record is bad; raised short inside, given its place once outside."""


def as_text(value: Any, name: str) -> str:
    """Text that says something."""
    if not isinstance(value, str):
        raise Reason(f"{name!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise Reason(f"{name!r} is empty")
    return value


def as_list(value: Any, name: str) -> list[Any]:
    """A list, as it is."""
    if not isinstance(value, list):
        raise Reason(f"{name!r} must be a list, got {type(value).__name__}")
    return value


def as_messages(values: Any, name: str) -> list[Message]:
    """A list of messages; ``name`` is the column, for messages about the messages."""
    return [_message(value, f"{name}[{index}]") for index, value in enumerate(as_list(values, name))]


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise Reason(f"{name!r} must be a message with 'role' and 'content', got {type(value).__name__}")
    message = {key: item for key, item in value.items() if item is not None}
    if "from" in message and "value" in message:
        message = {"role": ROLES.get(message["from"], message["from"]), "content": message["value"]}
    assistant = message.get("role") == "assistant"
    speaks_otherwise = assistant and bool(set(message) - {"role", "content", "name"})  # tool calls, reasoning
    for key in ("role", "content"):
        if not isinstance(message.get(key), str) and not (key == "content" and key not in message and speaks_otherwise):
            raise Reason(f"{name!r} needs a text {key!r}, got {type(message.get(key)).__name__}")
    if message["role"] in ("assistant", "user") and not speaks_otherwise and not message["content"].strip():
        raise Reason(f"{name!r} is a message of the {message['role']} that is empty")
    return message


def as_tools(value: Any, conversational: bool) -> list[dict[str, Any]] | None:
    """JSON schemas of the tools that a conversation may call, a list or its JSON text; ``None`` where there are none.

    Text, because a table gives every schema in a column the fields of all others.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise Reason(f"'tools' is text and not JSON: {error}") from None
    tools = as_list(value, "tools")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise Reason(f"'tools[{index}]' must be a JSON schema, got {type(tool).__name__}")
    if tools and not conversational:
        raise Reason("'tools' are written into the prompt by a chat template, and this prompt is plain text")
    return [dict(tool) for tool in tools] or None


def shared_messages(conversations: Sequence[Sequence[Message]]) -> int:
    """How many messages all conversations have in common at their start."""
    first, *others = conversations
    shared = min(map(len, conversations))
    for other in others:
        shared = next((n for n in range(shared) if first[n] != other[n]), shared)
    return shared
