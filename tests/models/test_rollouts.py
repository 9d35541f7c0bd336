"""Rollouts through a packed model: masks with holes, shared beginnings, duplicates; exact in values and gradients."""

from __future__ import annotations

import pytest
import torch
import zoo

import ppcompile
from ppcompile.runtime.batch import PackedBatch
from ppcompile.verification import unpacked_logps


def conversations() -> list:
    """Three levels of sharing, a duplicate, a rollout that begins another, tokens scored in one and not in the next."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(0, zoo.VOCABULARY, (count,), generator=generator).tolist()

    system, user, answer = ids(9), ids(5), ids(6)
    first = [*system, *user, *answer]
    mask = [0] * 14 + [1] * 6
    branch = [ppcompile.Rollout(first + ids(n), mask + [0] * (n // 2) + [1] * (n - n // 2)) for n in (7, 4)]
    return [
        [*branch, branch[0], ppcompile.Rollout(first, mask)],
        ppcompile.Rollout([*system, *ids(8)], [0] * 9 + [0, 1, 1, 0, 0, 1, 0, 0]),
        ppcompile.Group([*system, *user], [answer, ids(3)]),
        [ppcompile.Rollout(first, [0] * 17 + [1] * 3), ppcompile.Rollout(ids(2), [0, 1])],
    ]


def by_hand(model: torch.nn.Module, entries: list) -> list[torch.Tensor]:
    """For each sequence the log-probabilities of its scored tokens, from nothing but the entries."""
    found = []
    for entry in entries:
        if isinstance(entry, ppcompile.Group):
            context = [0] * len(entry.prompt)
            rows = [ppcompile.Rollout([*entry.prompt, *r], context + [1] * len(r)) for r in entry.responses]
        else:
            rows = entry if isinstance(entry, list) else [entry]
        for row in rows:
            ids = torch.tensor(row.input_ids)
            logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            found.append(logps[torch.tensor(row.completion_mask[1:]).bool()])
    return found


@pytest.mark.parametrize(("name", "share"), [("llama", "prompt"), ("gemma2", "tree")])
def test_rollouts_score_what_the_unpacked_model_gives_them(name: str, share: str) -> None:
    model = zoo.EXACT[name]()
    batch: PackedBatch = ppcompile.pack(conversations(), share=share, pad_to_multiple_of=16)
    ppcompile.verify(model, batch)
    with torch.no_grad():
        expected = by_hand(model, conversations())
        out = ppcompile.wrap(model)(batch)
        assert torch.allclose(unpacked_logps(model, batch), torch.cat(expected), atol=1e-6), "verify's own reference"
    assert out.lengths.tolist() == [len(logps) for logps in expected]
    assert torch.allclose(out.token_logps, torch.cat(expected), atol=5e-5)
    assert torch.allclose(out.logps, torch.stack([logps.sum() for logps in expected]), atol=2e-4)
