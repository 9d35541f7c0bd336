"""The pool where every group's prompt is stored once, and nothing else is shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .pool import Part, Pool, Work, subsets, triangle

__all__ = ["PromptPool"]


class PromptPool(Pool):
    """Every group's prompt is stored once, and nothing else is shared."""

    def reset(self) -> None:
        """All sequences wait, and no pack is open."""
        super().reset()
        self.sizes = np.fromiter((item.record.num_tokens for item in self.items), np.int64, len(self.items))
        self.needs = self.sizes

    def open(self) -> None:
        """Begin a pack; what an item needs does not depend on what is in it."""

    def _response_sizes(self, item: int, positions: Sequence[int]) -> list[int]:
        responses = self.items[item].record.responses
        return [len(responses[n]) for n in positions]

    def _move(self, item: int, positions: Sequence[int]) -> Work:
        prompt = len(self.items[item].record.prompt)
        sizes = self._response_sizes(item, positions)
        pairs = triangle(prompt) + sum(size * prompt + triangle(size) for size in sizes)
        return Work(prompt + sum(sizes), pairs)

    def _shrink(self, item: int) -> None:
        self.sizes[item] = len(self.items[item].record.prompt) + sum(self._response_sizes(item, self.left[item]))

    def parts(self, item: int, space: int) -> Iterator[Part]:
        """Each of the longest responses first, then the next longest that fit."""
        prompt, left = len(self.items[item].record.prompt), self.left[item]
        sizes = self._response_sizes(item, left)
        for chosen in subsets(sizes, space - prompt):
            yield Part([left[n] for n in chosen], prompt + sum(sizes[n] for n in chosen), prompt)
