"""Token ids of a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ppcompile.data.chat import ChatTemplate, Piece
from ppcompile.data.messages import Message, Reason, Response
from ppcompile.data.records import BadRecord, Pairs, Preference
from ppcompile.runtime.groups import Group, Rollout

__all__ = ["RecordTokenizer", "TokenizedPreference", "tokenize"]


@dataclass(frozen=True)
class TokenizedPreference:
    """A :class:`Preference` as token ids.

    Attributes:
        prompt: ids ``[P]``, which every response follows.
        responses: one row of ids for each.
        pairs: ``(winner, loser)`` indices into the responses.
        where: of the record.
        scores: of the record.
        masks: for each response, which of its tokens are scored; ``None``: all of them.
    """

    prompt: list[int]
    responses: list[list[int]]
    pairs: Pairs
    where: str
    scores: tuple[float, ...] | None = None
    masks: list[list[bool]] | None = None

    @property
    def packed_tokens(self) -> int:
        """Tokens of the group when the prompt is stored once."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def unpacked_tokens(self) -> int:
        """Tokens of one full sequence per response."""
        return len(self.prompt) * len(self.responses) + sum(map(len, self.responses))

    @property
    def entry(self) -> Group | list[Rollout]:
        """What ``ppcompile.pack`` takes: a group, or rollouts where not all of a response is scored."""
        if self.masks is None:
            return Group(prompt=self.prompt, responses=self.responses)
        unscored = [False] * len(self.prompt)
        return [
            Rollout(input_ids=[*self.prompt, *ids], completion_mask=[*unscored, *mask])
            for ids, mask in zip(self.responses, self.masks, strict=True)
        ]


def tokenize(record: Preference, tokenizer: Any, **options: Any) -> TokenizedPreference:
    """Token ids of one record: ``RecordTokenizer(tokenizer, **options)(record)``."""
    return RecordTokenizer(tokenizer, **options)(record)


@dataclass(frozen=True)
class RecordTokenizer:
    """Turns records into token ids, prompt and responses apart, so that the prompt is the same under each.

    Messages go through the tokenizer's own chat template (``ppcompile.data.chat``). What is scored of a response is
    what the template marks; without marks, each message of the assistant up to and including the special token that
    ends its turn, or followed by the end-of-sequence token where the template ends turns with none. A text prompt keeps
    what the tokenizer puts in front (a beginning-of-sequence token) and its responses end with the end-of-sequence
    token.

    Attributes:
        tokenizer: a transformers tokenizer; for text, anything with ``__call__(text, add_special_tokens=)`` giving
            ``input_ids``, and ``eos_token_id``.
        max_prompt_tokens: longer prompts lose their beginning.
        max_response_tokens: longer responses lose their end, the end token included.
        chat_template_kwargs: passed on to the chat template.

    Raises:
        ValueError: a limit below one.
    """

    tokenizer: Any
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_response_tokens"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, or None for no limit; got {limit}")

    def __call__(self, record: Preference) -> TokenizedPreference:
        """Token ids of ``record``.

        Raises:
            BadRecord: messages that the chat template cannot write (see :meth:`ChatTemplate.render`), or nothing left
                of the prompt or of what is scored.
            ValueError: the tokenizer has no end token where one is needed.
        """
        try:
            if isinstance(record.prompt, str):
                prompt, rows = self._text(record.prompt, record.responses)
            else:
                prompt, rows = self._chat(record.prompt, record.responses, record.tools)
            if not prompt:
                raise Reason("the prompt has no tokens, so nothing predicts the first token of a response")
            rows = [row.cut(self.max_response_tokens) for row in rows]
            for n, row in enumerate(rows):
                if not any(row.scored):
                    raise Reason(f"response {n} has no scored tokens" + " within max_response_tokens" * bool(row.ids))
        except Reason as reason:
            raise BadRecord(record.where, str(reason)) from reason
        whole = all(all(row.scored) for row in rows)
        return TokenizedPreference(
            prompt[-(self.max_prompt_tokens or 0) :],
            [row.ids for row in rows],
            record.pairs,
            record.where,
            record.scores,
            None if whole else [row.scored for row in rows],
        )

    # ------------------------------------------------------------------ text

    def _text(self, prompt: str, responses: tuple[Response, ...]) -> tuple[list[int], list[_Row]]:
        ids, end = self._ids(prompt, special=True), self._eos
        appended = ids[-1:] == [end] and self._ids(prompt)[-1:] != [end]
        rows = []
        for n, text in enumerate(responses):
            if not isinstance(text, str):
                raise Reason(f"response {n} is messages and the prompt is text; make both messages")
            rows.append(_Row.of([*self._following(text), end], True))
        return ids[:-1] if appended else ids, rows

    @cached_property
    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"{type(self.tokenizer).__name__} has no end-of-sequence token; set tokenizer.eos_token")
        return int(self.tokenizer.eos_token_id)

    # ------------------------------------------------------------------ messages

    def _chat(
        self, prompt: list[Message], responses: tuple[Response, ...], tools: list[dict[str, Any]] | None
    ) -> tuple[list[int], list[_Row]]:
        rendering = self._template.render(prompt, responses, tools)
        return self._ids(rendering.prompt), [self._row(pieces, rendering.marked) for pieces in rendering.responses]

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.chat_template_kwargs)

    def _row(self, pieces: list[Piece], marked: bool) -> _Row:
        """Ids of a response's pieces, one after the other."""
        row = _Row([], [])
        for piece in pieces:
            last = piece is pieces[-1]
            if piece.scored and not marked:
                row += self._turn(piece.text, last)
                continue
            ids = self._following(piece.text)
            row += _Row.of(ids[: self._end(ids)] if last and not piece.scored else ids, piece.scored)
        return row

    def _turn(self, text: str, last: bool) -> _Row:
        """A message of the assistant up to the token that ends it, and the blank text behind, which is not scored."""
        ids = self._following(text)
        end = self._end(ids)
        if end and ids[end - 1] in self._special:
            return _Row.of(ids[:end], True) + _Row.of([] if last else ids[end:], False)
        # The template ends turns with plain text or nothing; at the very end the end-of-sequence token stands in.
        said = text.removesuffix(self._template.end_of_turn)
        behind = [] if last else self._following(text[len(said) :])
        ending = [self._eos] if last else []
        return _Row.of([*self._following(said), *ending], True) + _Row.of(behind, False)

    def _end(self, ids: list[int]) -> int:
        """Length of ``ids`` without the blank text that a template writes behind the token that ends a turn."""
        end = max((n + 1 for n, token in enumerate(ids) if token in self._special), default=0)
        return len(ids) if self.tokenizer.decode(ids[end:]).strip() else end

    @cached_property
    def _special(self) -> frozenset[int]:
        # Not `all_special_ids`: that leaves out a special token without a role of its own, such as <|im_end|>.
        return frozenset(index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special)

    # ------------------------------------------------------------------ ids

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def _following(self, text: str) -> list[int]:
        """Ids of a text that follows another one.

        Tokenizers that put a space in front of every text (sentencepiece's) get a line break to put it in front of.
        """
        if not self._puts_a_space_in_front:
            return self._ids(text)
        front, ids = self._ids("\n"), self._ids(f"\n{text}")
        if ids[: len(front)] != front:
            raise Reason(f"{type(self.tokenizer).__name__} does not tokenize a text that follows another one by itself")
        return ids[len(front) :]

    @cached_property
    def _puts_a_space_in_front(self) -> bool:
        return self._ids("\nb") != [*self._ids("\n"), *self._ids("b")]


@dataclass(frozen=True)
class _Row:
    """Ids of a response, and which of them are scored."""

    ids: list[int]
    scored: list[bool]

    @classmethod
    def of(cls, ids: list[int], scored: bool) -> _Row:
        return cls(ids, [scored] * len(ids))

    def __add__(self, other: _Row) -> _Row:
        return _Row([*self.ids, *other.ids], [*self.scored, *other.scored])

    def cut(self, limit: int | None) -> _Row:
        """At most the first ``limit`` tokens."""
        return _Row(self.ids[:limit], self.scored[:limit])
