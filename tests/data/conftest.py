"""Tokenizers made on the spot: one id per character, with chat templates of every temper."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + HEADER
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}"
    + TURN
    + "{% endif %}{% endfor %}"
    + HEADER
)
TEMPLATES = {
    "chatml": CHATML,
    "marked": MARKED,
    # As some models of 2025 write it: reasoning stands only in the last turn.
    "forgets reasoning": (
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}"
        "<|im_start|>assistant\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
        "{% else %}" + TURN + "{% endif %}{% endfor %}" + HEADER
    ),
    "opens reasoning": (
        "{% for m in messages %}" + TURN + "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
    ),
    "alternates": (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}" + TURN + "{% endfor %}" + HEADER
    ),
    "tools": "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] %}<call>{{ call['function'] | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    + HEADER,
    "breaks": "{{ messages[0]['content'] + 1 }}",
    "plain": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "trims": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    + HEADER,
}


def _characters(template: str | None, spaced: bool) -> PreTrainedTokenizerFast:
    letters = {chr(code): code for code in range(128)} | {"▁": 128}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    split = pre_tokenizers.Split("", "isolated")
    space = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([space, split]) if spaced else split
    tokenizer.decoder = decoders.Fuse()
    special = ["<|im_start|>", "<|im_end|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", additional_special_tokens=special, chat_template=template
    )


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """``make_tokenizer(template="chatml", spaced=False)``; ``spaced`` puts a space in front of every text."""

    def make(template: str | None = "chatml", spaced: bool = False) -> PreTrainedTokenizerFast:
        return _characters(TEMPLATES[template] if template else None, spaced)

    return make
