"""The sets of ``../shared/data`` as token ids, counted the way their README counts them.

Prompt and response are tokenized apart; of tree data each conversation is a rollout whose assistant messages are
scored. An image counts one token for each patch of 28 pixels, and different images are different tokens.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from ppcompile import Group, Rollout

from .workload import SHARED, VOCABULARY

__all__ = ["Entry", "data_sets", "published", "synthetic", "tokenized"]

Entry = Group | list[Rollout]

PUBLISHED_COLUMNS = 10
PATCH = 28
IMAGE = "<|image_pad|>"


def data_sets() -> list[str]:
    """Names of the sets that are there."""
    return sorted(path.name.removesuffix(".jsonl.gz") for path in SHARED.glob("*.jsonl.gz"))


def published() -> dict[str, dict[str, float]]:
    """Reductions of whole sets by what is shared, from the table of ``../shared/data/README.md``.

    ``prompt``: each prompt once, where one is given; ``tree``: one trie a record.
    """
    found: dict[str, dict[str, float]] = {}
    for line in (SHARED / "README.md").read_text(encoding="utf-8").splitlines() if SHARED.is_dir() else ():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == PUBLISHED_COLUMNS and cells[0].startswith("`"):
            prompt_once, record_trie = cells[7:9]
            known = {"prompt": prompt_once, "tree": record_trie}
            found[cells[0].strip("`")] = {share: float(text) for share, text in known.items() if text}
    return found


def tokenized(name: str) -> list[Entry]:
    """The groups of a set."""
    reader = _Reader()
    with gzip.open(SHARED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [reader.entry(json.loads(line)) for line in lines]


class _Reader:
    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizer")
        self.image_token = self.tokenizer.convert_tokens_to_ids(IMAGE)
        self.images: dict[str, int] = {}

    def entry(self, record: dict[str, Any]) -> Entry:
        if "conversations" in record:
            return [self._rollout(messages) for messages in record["conversations"]]
        prompt = self._ids(self._render(record["prompt"], header=True))
        if record.get("images"):
            prompt = self._with_images(prompt, record["images"])
        end = self.tokenizer.eos_token
        return Group(prompt, [self._ids(response + end) for response in record["responses"]])

    def _rollout(self, messages: list[dict[str, str]]) -> Rollout:
        ids: list[np.ndarray] = []
        scored: list[np.ndarray] = []
        before = ""
        for n, message in enumerate(messages):
            whole = self._render(messages[: n + 1])
            header = self._render(messages[:n], header=True) if message["role"] == "assistant" else whole
            for text, is_scored in ((header[len(before) :], False), (whole[len(header) :], True)):
                ids.append(self._ids(text))
                scored.append(np.full(len(ids[-1]), is_scored))
            before = whole
        return Rollout(np.concatenate(ids), np.concatenate(scored))

    def _render(self, messages: list[dict[str, str]], header: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(messages, add_generation_prompt=header, tokenize=False)
        return text

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    def _with_images(self, ids: np.ndarray, paths: list[str]) -> np.ndarray:
        places = np.flatnonzero(ids == self.image_token)
        filled = [self._image(path) for path in paths]
        return np.concatenate(
            [
                piece
                for text, image in zip(np.split(ids, places), [np.empty(0, np.int64), *filled], strict=True)
                for piece in (image, text[1:] if len(image) else text)
            ]
        )

    def _image(self, path: str) -> np.ndarray:
        width, height = _png_size(SHARED / path)
        token = VOCABULARY + self.images.setdefault(path, len(self.images))
        return np.full(round(width / PATCH) * round(height / PATCH), token, dtype=np.int64)


def _png_size(path: Path) -> tuple[int, int]:
    """Width and height, from the header of the file."""
    header = path.read_bytes()[16:24]
    return int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")


def synthetic(count: int, seed: int = 0) -> list[Entry]:
    """Groups of random tokens with log-normal lengths, a quarter of them with one of a few preambles."""
    rng = np.random.default_rng(seed)
    preambles = [rng.integers(0, VOCABULARY, 300) for _ in range(4)]
    sizes = np.exp(rng.normal(np.log((96, 64, 64)), 0.7, (count, 3))).astype(int).clip(1, 2000)
    groups: list[Entry] = []
    for n, (prompt, *responses) in enumerate(sizes.tolist()):
        start = preambles[n // 4 % 4] if n % 4 == 0 else np.empty(0, np.int64)
        ids = np.concatenate([start, rng.integers(0, VOCABULARY, prompt)])
        groups.append(Group(ids, [rng.integers(0, VOCABULARY, size) for size in responses]))
    return groups
