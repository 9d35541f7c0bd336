"""Token ids of a preference record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ppcompile.data.records import BadRecord, Pairs, Preference

__all__ = ["TokenizedPreference", "tokenize"]


@dataclass(frozen=True)
class TokenizedPreference:
    """A :class:`Preference` as token ids: ``prompt [P]``, one list per response, and the same ``pairs``."""

    prompt: list[int]
    responses: list[list[int]]
    pairs: Pairs
    where: str

    @property
    def packed_tokens(self) -> int:
        """Tokens of the group when the prompt is stored once."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def unpacked_tokens(self) -> int:
        """Tokens of one full sequence per response."""
        return len(self.prompt) * len(self.responses) + sum(map(len, self.responses))


def tokenize(
    record: Preference,
    tokenizer: Any,
    *,
    max_prompt_tokens: int | None = None,
    max_response_tokens: int | None = None,
) -> TokenizedPreference:
    """Token ids of a record, prompt and responses tokenized apart, so that the prompt is the same under each.

    Messages go through the tokenizer's own chat template with a generation header; a response is its text and the
    token that ends the assistant's turn in that template. A text prompt keeps what the tokenizer puts in front
    (a beginning-of-sequence token) and its responses end with the end-of-sequence token.

    Args:
        record: what :func:`read_preferences` gave.
        tokenizer: a transformers tokenizer, or anything with ``__call__(text, add_special_tokens=)`` giving
            ``input_ids``, ``eos_token_id`` and, for messages, ``apply_chat_template``.
        max_prompt_tokens: longer prompts lose their beginning.
        max_response_tokens: longer responses lose their end, the end token included.

    Raises:
        BadRecord: messages and a tokenizer without a chat template, or nothing left of the prompt or a response.
        ValueError: a limit below one, or a tokenizer without an end token.
    """
    for name, limit in (("max_prompt_tokens", max_prompt_tokens), ("max_response_tokens", max_response_tokens)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1, or None for no limit; got {limit}")
    prompt, end = _prompt_ids(record, tokenizer)
    if not prompt:
        raise BadRecord(record.where, "the prompt has no tokens, so nothing predicts the first token of a response")
    responses = [[*_ids(tokenizer, text), end][:max_response_tokens] for text in record.responses]
    return TokenizedPreference(prompt[-(max_prompt_tokens or 0) :], responses, record.pairs, record.where)


def _ids(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _prompt_ids(record: Preference, tokenizer: Any) -> tuple[list[int], int]:
    """Ids of the prompt, and the token that ends a response to it."""
    eos = tokenizer.eos_token_id
    if isinstance(record.prompt, str):
        if eos is None:
            raise ValueError(f"{type(tokenizer).__name__} has no end-of-sequence token; set tokenizer.eos_token")
        ids = _ids(tokenizer, record.prompt, special=True)
        appended = ids[-1:] == [eos] and _ids(tokenizer, record.prompt)[-1:] != [eos]
        return (ids[:-1] if appended else ids), eos  # some tokenizers end every text; the prompt goes on
    if not getattr(tokenizer, "chat_template", None):
        raise BadRecord(
            record.where, f"the prompt is a conversation and {type(tokenizer).__name__} has no chat_template"
        )
    render: Callable[..., Any] = tokenizer.apply_chat_template
    ids = render(record.prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    return list(ids), _end_of_turn(tokenizer)


def _end_of_turn(tokenizer: Any) -> int:
    """The first special token that the chat template writes after an assistant's message, else the eos token.

    The two differ where a base model's tokenizer carries a chat template.
    """
    mark = "0123456789"
    turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": mark}]
    tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(mark)[2]
    # Not `all_special_ids`: that leaves out a special token without a role of its own, such as <|im_end|>.
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = next((token for token in _ids(tokenizer, tail) if token in special), tokenizer.eos_token_id)
    if end is None:
        raise ValueError(
            f"{type(tokenizer).__name__}: no special token ends an assistant turn, and there is no eos_token"
        )
    return int(end)
