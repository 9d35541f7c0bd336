"""The loop of the documentation on two ranks: the loader deals the packs, the pairs of a step weigh the losses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import zoo
from ranks import WORLD, Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ppcompile
from ppcompile.data import PackBatchSampler, PreferenceBatch, TokenizedDataset
from ppcompile.losses import dpo_loss


class Records:
    """Records of token ids, of one to four pairs each; iterable any number of times, not indexable."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        ids = lambda n: torch.randint(3, zoo.VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
        for n in range(43):
            responses = [ids(2 + (n + r) % 5) for r in range(2 + n % 4)]
            yield {"prompt": ids(3 + n % 7), "responses": responses, "scores": [*range(len(responses))]}


def loader(streaming: bool, **options: Any) -> ppcompile.PackedDataLoader:
    data: Any = Records() if streaming else list(Records())
    return ppcompile.PackedDataLoader(data, max_tokens=70, window=2, packs_per_step=2, **options)


def sum_of_losses(packed: nn.Module, batch: PreferenceBatch) -> Tensor:
    logps = packed(batch).logps
    return dpo_loss(logps, torch.zeros_like(logps), batch.pairs, beta=0.5).losses.sum()


def steps_of_one_process(packed: nn.Module, streaming: bool) -> list[dict[str, Tensor]]:
    """For each optimizer step of an epoch, the gradient of the mean over the pairs of all ranks' packs."""
    batches = [list(loader(streaming, rank=rank, world_size=WORLD)) for rank in range(WORLD)]
    steps: list[dict[str, Tensor]] = []
    for index in range(batches[0][-1].step.index + 1):
        packs = [batch for of_rank in batches for batch in of_rank if batch.step.index == index]
        pairs = sum(len(batch.pairs) for batch in packs)
        packed.zero_grad()
        for batch in packs:
            (sum_of_losses(packed, batch) / pairs).backward()
        steps.append({path: p.grad.clone() for path, p in packed.named_parameters()})
    packed.zero_grad()
    return steps


def gradients_of_the_mean(parallel: str, streaming: bool) -> None:
    packed = ppcompile.wrap(zoo.EXACT["llama"]())
    expected = steps_of_one_process(packed, streaming)
    assert len(expected) > 2
    model: nn.Module = packed
    if parallel == "replicas":
        model = DistributedDataParallel(packed)
    else:
        for layer in packed.model.layers:
            fully_shard(layer)
        fully_shard(packed)
    counts = [0, 0]
    for batch in loader(streaming):  # rank and world size are those of torch.distributed
        (sum_of_losses(model, batch) * WORLD / batch.step.weight).backward()
        counts[0] += 1
        if batch.ends_step:
            for path, parameter in packed.named_parameters():
                found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                wanted = expected[batch.step.index][path]
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 + 1e-5 * wanted.abs().max().item())
            model.zero_grad()
            counts[1] += 1
    assert counts[1] == len(expected)
    of_all: list[Any] = [None] * WORLD
    dist.all_gather_object(of_all, counts)
    assert of_all == [counts] * WORLD


@pytest.mark.parametrize(("parallel", "streaming"), [("replicas", True), ("shards", False)])
def test_each_step_has_the_gradient_of_the_mean_over_its_pairs(ranks: Ranks, parallel: str, streaming: bool) -> None:
    ranks.run(gradients_of_the_mean, parallel, streaming)


def resumed_from_a_checkpoint(folder: str) -> None:
    rank, whole = dist.get_rank(), loader(streaming=False)
    seen = []
    for batch in whole:
        seen.append(batch.group_index.tolist())
        if len(seen) == 3:
            dcp.save({f"loader {rank}": whole}, checkpoint_id=folder)
    again = loader(streaming=False)
    dcp.load({f"loader {rank}": again}, checkpoint_id=folder)
    assert [batch.group_index.tolist() for batch in again] == seen[3:]
    with pytest.raises(ValueError, match=r"saved with rank=\d \(now \d\)"):
        again.load_state_dict({**whole.state_dict(), "settings": {**whole._settings(), "rank": 1 - rank}})


def test_each_rank_resumes_from_its_own_state_in_a_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(resumed_from_a_checkpoint, str(tmp_path))


def parts_of_the_data(kind: str) -> None:
    rank, records = dist.get_rank(), list(Records())
    part = records[rank::WORLD]
    if kind == "sampler":
        samples = TokenizedDataset(part)
        plans: Any = PackBatchSampler(samples, max_tokens=70)
    else:
        plans = ppcompile.PackedDataLoader(part, max_tokens=70, streaming=kind == "stream")
    said = ""
    try:
        next(iter(plans))
    except ValueError as error:
        said = str(error)
    of_all: list[Any] = [None] * WORLD
    dist.all_gather_object(of_all, said)
    found = next(filter(None, of_all))  # the rank that came later sees it
    assert re.search(r"rank \d and rank \d pack different data.*Give every rank all records in the same order", found)
    mine = ppcompile.PackedDataLoader(part, max_tokens=70, rank=0, world_size=1)
    assert sum(batch.num_groups for batch in mine) == len(part)


@pytest.mark.parametrize("kind", ["list", "stream", "sampler"])
def test_ranks_that_are_given_parts_of_the_data_are_told(ranks: Ranks, kind: str) -> None:
    ranks.run(parts_of_the_data, kind)
