"""What sharded ranks save with torch.distributed.checkpoint loads anywhere: other ranks, plain transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import zoo
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import ppcompile

BUILD = zoo._transformers("llama", tie_word_embeddings=True)


def batch() -> ppcompile.PackedBatch:
    return ppcompile.pack([ppcompile.Group([5, 9, 33, 71, 8], [[40, 41, 7], [66, 13]])])


def sharded(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    packed = ppcompile.wrap(model)
    for layer in packed.model.layers:
        fully_shard(layer)
    fully_shard(packed)
    return packed, torch.optim.AdamW(packed.parameters(), lr=0.05)


def train(packed: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    packed(batch()).logps.sum().neg().backward()
    optimizer.step()


def save_and_load(folder: str) -> None:
    from transformers import AutoModelForCausalLM

    packed, optimizer = sharded(BUILD())
    train(packed, optimizer)
    weights, moments = get_state_dict(packed, optimizer)
    assert set(weights) == set(BUILD().state_dict())
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/shards")

    again, its_optimizer = sharded(zoo.sharpen(BUILD(), seed=1))
    weights, moments = get_state_dict(again, its_optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=f"{folder}/shards")
    set_state_dict(again, its_optimizer, model_state_dict=weights, optim_state_dict=moments)
    for steps in range(2):
        assert torch.equal(again(batch()).logps, packed(batch()).logps), f"after {steps} further steps"
        train(packed, optimizer)
        train(again, its_optimizer)

    full = get_model_state_dict(packed, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    logps = packed(batch()).logps
    if dist.get_rank() == 0:
        packed.save_pretrained(f"{folder}/plain", state_dict=dict(full))
        plain = AutoModelForCausalLM.from_pretrained(f"{folder}/plain").eval()
        assert plain.lm_head.weight is plain.model.embed_tokens.weight
        for path, parameter in plain.named_parameters():
            assert torch.equal(parameter, full[path]), path
        assert torch.equal(ppcompile.wrap(plain)(batch()).logps, logps)


def test_shards_load_on_ranks_and_in_plain_transformers(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save_and_load, str(tmp_path))
