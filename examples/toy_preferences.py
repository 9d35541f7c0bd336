"""The default of examples/dpo.py, made on the spot: a preference task, a byte tokenizer, and a small Llama.

The task: a prompt names the letters in a bag, a response spells a "word". The preferred one takes its letters from the
bag; three others hold two, four or six letters that are not in it. A response alone does not tell right from wrong,
so a model can only learn this by looking at the prompt.
"""

from __future__ import annotations

import random
import string

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ppcompile.data import Preference

__all__ = ["ByteTokenizer", "small_llama", "spelling_preferences"]

WORD, BAG = 6, 12
FOREIGN = (0, 2, 4, 6)
"""Letters from outside the bag in each of the four responses; the first is the preferred one."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and two special tokens: beginning (256) and end (257) of a sequence."""

    bos_token_id, eos_token_id = 256, 257
    vocab_size = 258

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """``{"input_ids": [...]}``, with the beginning token in front if ``add_special_tokens``."""
        ids = list(text.encode())
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}


def spelling_preferences(count: int, seed: int) -> list[Preference]:
    """``count`` records of the task above, four responses each in random order."""
    rng = random.Random(seed)
    return [_record(rng, f"generated record {number}") for number in range(1, count + 1)]


def _record(rng: random.Random, where: str) -> Preference:
    letters = rng.sample(string.ascii_lowercase, 26)
    bag, others = letters[:BAG], letters[BAG:]
    words = []
    for foreign in FOREIGN:
        word = rng.sample(bag, WORD - foreign) + rng.sample(others, foreign)
        rng.shuffle(word)
        words.append("".join(word))
    order = rng.sample(range(len(words)), len(words))
    right = order.index(0)
    pairs = tuple((right, wrong) for wrong in range(len(words)) if wrong != right)
    return Preference(f"bag: {''.join(bag)}\nspell a word: ", tuple(words[n] for n in order), pairs, where)


def small_llama(seed: int) -> LlamaForCausalLM:
    """A randomly initialized Llama of 0.2 million parameters, small enough to train on two CPU cores in seconds.

    Tied embeddings and a wide initialization let it copy letters from the start, so that it learns the task steadily.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=ByteTokenizer.bos_token_id,
        eos_token_id=ByteTokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)
