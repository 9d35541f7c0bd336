"""Two ways to get the log-probability of every response: packed, and one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import ppcompile
from ppcompile.data import TokenizedPreference

__all__ = ["OneByOne", "Packed"]

Groups = Sequence[TokenizedPreference]


class Packed:
    """Scores groups in packs: each prompt is computed once."""

    def __init__(self, model: nn.Module, max_tokens: int) -> None:
        self.module: nn.Module = ppcompile.wrap(model)
        self.device = next(model.parameters()).device
        self.max_tokens = max_tokens

    def split(self, groups: Groups) -> Iterator[list[TokenizedPreference]]:
        """Packs under the token budget.

        Raises:
            ValueError: a group is larger than the budget by itself.
        """
        for group in groups:
            if group.packed_tokens > self.max_tokens:
                raise ValueError(
                    f"{group.where}: {group.packed_tokens} tokens do not fit into packs of {self.max_tokens}; "
                    "raise --max-tokens, or shorten with --max-prompt-tokens and --max-response-tokens"
                )
        entries = [group.entry for group in groups]
        for plan in ppcompile.plan_packs(entries, max_tokens=self.max_tokens, shuffle=False):
            yield [groups[n] for n in plan.group_index]

    def tokens(self, groups: Groups) -> int:
        """Tokens that go through the model for these groups."""
        return sum(group.packed_tokens for group in groups)

    def logps(self, groups: Groups) -> Tensor:
        """Float32 ``[R]``: summed log-probability of each response, in input order."""
        batch = ppcompile.pack([group.entry for group in groups])
        logps: Tensor = self.module(batch.to(self.device)).logps
        return logps


class OneByOne:
    """The baseline: the eager model, one full sequence at a time, no padding and no sharing."""

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self.device = next(model.parameters()).device

    def split(self, groups: Groups) -> Iterator[list[TokenizedPreference]]:
        """One group at a time, so that no more activations are kept than a pair loss needs."""
        yield from ([group] for group in groups)

    def tokens(self, groups: Groups) -> int:
        """Tokens that go through the model for these groups."""
        return sum(group.unpacked_tokens for group in groups)

    def logps(self, groups: Groups) -> Tensor:
        """Float32 ``[R]``: summed log-probability of each response, in input order."""
        return torch.stack([self._logp(group, n) for group in groups for n in range(len(group.responses))])

    def _logp(self, group: TokenizedPreference, n: int) -> Tensor:
        prompt, response = group.prompt, group.responses[n]
        ids = torch.tensor([[*prompt, *response]], device=self.device)
        logits = self.module(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps = logits.float().log_softmax(dim=-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        scored = torch.tensor(group.masks[n] if group.masks else [True] * len(response), device=self.device)
        return logps[scored].sum()
