"""A conversation as the tokenizer's own chat template writes it, cut where scoring starts and stops.

A :class:`Rendering` is the text of the prompt (with the header that the template puts in front of an answer), and for
each response a row of :class:`Piece`, by turns scored and not. Two ways lead to the cuts:

* the template marks what the assistant says (``{% generation %}``): its marks are taken as they are;
* otherwise the conversation is rendered up to each message of the assistant, with the header in front of it, and again
  with it. Both must be beginnings of the whole rendering. Templates that rewrite earlier turns (dropping their
  reasoning, for one) do not have that property: what a model saw when it wrote a turn is then not in the whole
  rendering, and such a conversation is refused by name.

Pieces are tokenized apart (``ppcompile.data.tokens``): a model that continues a prompt does not see tokens that span
the two either, and every response then follows the same prompt tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from ppcompile.data.messages import Message, Reason, Response

__all__ = ["ChatTemplate", "Piece", "Rendering"]

Span = tuple[int, int]

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = [{"role": "user", "content": "-"}]
PROBE_TOOLS = [
    {"type": "function", "function": {"name": "probe", "parameters": {"type": "object", "properties": {}}}},
]


@dataclass(frozen=True)
class Piece:
    """Text, and whether its tokens are scored."""

    text: str
    scored: bool


@dataclass(frozen=True)
class Rendering:
    """A prompt and the responses to it as text.

    Attributes:
        prompt: what all responses follow: with the header in front of an answer, if all of them begin with one.
        responses: the pieces of each, none empty, at least one of them scored.
        marked: the template itself says what is scored, the token that ends a turn included or not.
    """

    prompt: str
    responses: list[list[Piece]]
    marked: bool


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, with its options.

    Attributes:
        tokenizer: has ``apply_chat_template``, and ``get_chat_template`` where the template may hold marks.
        options: passed on to the template, such as ``{"enable_thinking": False}``.
    """

    tokenizer: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    def render(
        self, prompt: list[Message], responses: Sequence[Response], tools: list[dict[str, Any]] | None
    ) -> Rendering:
        """Prompt and responses in the template's own text.

        Raises:
            Reason: there is no template, it fails on this conversation, has no place for ``tools``, or writes the
                conversation in a way in which the prompt, or a turn, is not a beginning of the whole.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise Reason(f"the prompt is a conversation and {type(self.tokenizer).__name__} has no chat_template")
        if tools and not self._writes_tools:
            raise Reason("the record has 'tools', and the chat template does not write them into the prompt")
        answers = [_as_messages(response) for response in responses]
        header = all(answer[0]["role"] == "assistant" for answer in answers)
        head = self._text(prompt, tools, header=header)
        marked = MARKS.search(self.tokenizer.get_chat_template(tools=tools)) is not None
        pieces = [self._pieces(prompt, head, answer, tools, header, marked) for answer in answers]
        return Rendering(head, pieces, marked)

    def _pieces(
        self,
        prompt: list[Message],
        head: str,
        answer: list[Message],
        tools: list[dict[str, Any]] | None,
        header: bool,
        marked: bool,
    ) -> list[Piece]:
        conversation = [*prompt, *answer]
        whole = self._text(conversation, tools)
        if not whole.startswith(head):
            raise Reason(
                "the chat template does not write the conversation as a continuation of its prompt: prompt "
                f"{_tail(head)}, conversation {_tail(whole[: len(head)])}. Try: chat_template_kwargs (for one, "
                "enable_thinking=False), or a chat template made for training"
            )
        if marked:
            spans = self._marks(conversation, tools, whole, len(head))
        elif len(answer) == 1 and header:
            spans = [(len(head), len(whole))]
        else:
            spans = self._turns(conversation, tools, whole, len(prompt))
        return _cut(whole, len(head), spans)

    @cached_property
    def end_of_turn(self) -> str:
        """What the template writes after an assistant's message."""
        mark = "0123456789"
        return self._text([*PROBE, {"role": "assistant", "content": mark}], None).rpartition(mark)[2]

    def _text(self, messages: list[Message], tools: list[dict[str, Any]] | None, *, header: bool = False) -> str:
        text: str = self._apply(messages, tools, add_generation_prompt=header, tokenize=False)
        return text

    def _apply(self, messages: list[Message], tools: list[dict[str, Any]] | None, **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **how, **self.options)
        # What a template raises by itself, and what Python does when it meets a value that it was not written for.
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise Reason(f"the chat template failed: {type(error).__name__}: {error}") from error

    @cached_property
    def _writes_tools(self) -> bool:
        return self._text(PROBE, None) != self._text(PROBE, PROBE_TOOLS)

    def _marks(self, conversation: list[Message], tools: Any, whole: str, start: int) -> list[Span]:
        """Where the template's own marks say that the assistant speaks, behind the prompt."""
        encoded = self._apply(
            conversation,
            tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        marked = zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True)
        spans = _joined([(max(first, start), last) for (first, last), scored in marked if scored and last > start])
        if not any(whole[first:last].strip() for first, last in spans):
            raise Reason("the {% generation %} marks of the chat template hold nothing behind the prompt")
        return spans

    def _turns(self, conversation: list[Message], tools: Any, whole: str, first: int) -> list[Span]:
        """Each message of the assistant from ``first`` on: from the end of its header to the end of its turn."""
        spans = []
        for index in range(first, len(conversation)):
            if conversation[index]["role"] != "assistant":
                continue
            before = self._text(conversation[:index], tools, header=True)
            behind = self._text(conversation[: index + 1], tools)
            if not (behind.startswith(before) and whole.startswith(behind)):
                raise Reason(
                    f"the chat template is not prefix-consistent: message {index} reads {_tail(behind)} where it is "
                    "the last, and otherwise in the whole conversation, so what is scored would not be what was "
                    "said. Try: chat_template_kwargs, or a chat template made for training, with {% generation %} marks"
                )
            spans.append((len(before), len(behind)))
        return spans


def _as_messages(response: Response) -> list[Message]:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _cut(text: str, start: int, spans: list[Span]) -> list[Piece]:
    pieces, at = [], start
    for first, last in spans:
        pieces += [Piece(text[at:first], False), Piece(text[first:last], True)]
        at = last
    pieces.append(Piece(text[at:], False))
    return [piece for piece in pieces if piece.text]


def _joined(spans: list[Span]) -> list[Span]:
    """Spans of neighbouring tokens as one."""
    joined: list[Span] = []
    for first, last in spans:
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined


def _tail(text: str) -> str:
    return repr(text if len(text) <= 60 else f"...{text[-57:]}")
