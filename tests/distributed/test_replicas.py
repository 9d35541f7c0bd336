"""Two replicas, by DistributedDataParallel or by accelerate, give the gradients of one process over the same packs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import zoo
from ranks import WORLD, Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ppcompile
from ppcompile.losses import dpo_loss

PAIRS = {0: [(0, 1)], 1: [(0, 1), (0, 2), (3, 4)]}
"""Ranks hold packs of one and of three pairs."""


def pack_of(rank: int) -> ppcompile.PackedBatch:
    generator = torch.Generator().manual_seed(rank)
    ids = lambda n: torch.randint(3, zoo.VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    groups = [ppcompile.Group(ids(20), [ids(5), ids(7)])]
    if rank:
        groups = [ppcompile.Group(ids(9), [ids(3), ids(6), ids(4)]), ppcompile.Group(ids(12), [ids(8), ids(2)])]
    return ppcompile.pack(groups)


def sum_of_losses(packed: nn.Module, rank: int) -> Tensor:
    logps = packed(pack_of(rank)).logps
    return dpo_loss(logps, torch.zeros_like(logps), PAIRS[rank], beta=0.5).losses.sum()


def of_one_process(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and its gradient of the mean loss over all pairs of both packs."""
    packed = ppcompile.wrap(zoo.EXACT[name]())
    pairs = sum(map(len, PAIRS.values()))
    for rank in range(WORLD):
        (sum_of_losses(packed, rank) / pairs).backward()
    gradients = {path: p.grad.clone() for path, p in packed.named_parameters()}
    packed.zero_grad()
    return packed, gradients


def share_of_the_mean(rank: int) -> float:
    """W / pairs of all ranks: the weight of a rank's summed losses, where gradients are averaged over ranks."""
    pairs = torch.tensor(len(PAIRS[rank]))
    dist.all_reduce(pairs)
    return WORLD / int(pairs)


def data_parallel(name: str) -> None:
    rank = dist.get_rank()
    packed, expected = of_one_process(name)
    replica = DistributedDataParallel(packed)
    for _ in range(2):  # buffers are broadcast at every forward, and nothing is captured again for that
        replica.zero_grad()
        (sum_of_losses(replica, rank) * share_of_the_mean(rank)).backward()
        for path, parameter in packed.named_parameters():
            assert torch.equal(parameter.grad, expected[path]), path
    assert len(packed._compiled) == 1


@pytest.mark.parametrize("name", ["llama", "plain_written_out"])  # the second keeps its mask in a buffer
def test_data_parallel_gradients_are_those_of_one_process(ranks: Ranks, name: str) -> None:
    ranks.run(data_parallel, name)


def with_accelerate() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == WORLD
    packed, expected = of_one_process("llama")
    prepared, optimizer = accelerator.prepare(packed, torch.optim.SGD(packed.parameters(), lr=0.1))
    before = {path: p.detach().clone() for path, p in packed.named_parameters()}
    rank = accelerator.process_index
    accelerator.backward(sum_of_losses(prepared, rank) * share_of_the_mean(rank))
    for path, parameter in packed.named_parameters():
        assert torch.equal(parameter.grad, expected[path]), path
    optimizer.step()
    for path, parameter in packed.named_parameters():
        assert torch.equal(parameter, before[path].add(expected[path], alpha=-0.1)), path
    assert accelerator.unwrap_model(prepared) is packed


def test_accelerate_gives_the_gradients_of_one_process(ranks: Ranks) -> None:
    pytest.importorskip("accelerate")
    ranks.run(with_accelerate)


@pytest.mark.parametrize("wrapper", [DistributedDataParallel, nn.DataParallel])
def test_a_replica_is_not_wrapped(wrapper: type[nn.Module]) -> None:
    replica = wrapper.__new__(wrapper)
    with pytest.raises(TypeError, match=rf"{wrapper.__name__}\(ppcompile.wrap\(model\)\)"):
        ppcompile.wrap(replica)


def test_a_buffer_that_changes_is_noticed() -> None:
    """Writing the same numbers again is no change, other numbers are."""
    model = zoo.EXACT["plain_written_out"]()
    packed = ppcompile.wrap(model)
    mask = model.blocks[0].attention.mask
    before = packed(pack_of(0)).logps
    mask.copy_(mask.clone())
    packed(pack_of(0))
    assert len(packed._compiled) == 1
    window = torch.tril(mask) - torch.tril(mask, -4)
    mask.copy_(window)
    assert not torch.allclose(packed(pack_of(0)).logps, before)
    assert len(packed._compiled) == 2
