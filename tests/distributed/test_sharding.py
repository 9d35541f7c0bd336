"""FSDP2 on two ranks gives what one process gives on both ranks' packs, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from ranks import WORLD, Ranks
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import ppcompile
from ppcompile.verification import unpacked_logps


class Twice(zoo.PlainGPT):
    """Runs through its blocks a second time."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return self.head(self.norm(x))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": zoo.EXACT["llama"],
    "mixed_windows": zoo.EXACT["gemma2"],
    "tied_head": zoo._transformers("llama", tie_word_embeddings=True),
    "experts": zoo._transformers("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "unpacked_rows": zoo._plain(mixer=zoo.Convolution),
    "layers_used_twice": lambda: zoo.sharpen(Twice()).eval(),
}
ORDERS = ("wrap, shard the wrapped", "wrap, shard the model", "shard, wrap")


def pack_of(rank: int) -> ppcompile.PackedBatch:
    generator = torch.Generator().manual_seed(rank)
    ids = lambda n: torch.randint(3, zoo.VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    return ppcompile.pack([ppcompile.Group(ids(20 + rank), [ids(5), ids(7)]), ppcompile.Group(ids(9), [ids(3 + rank)])])


def list_of_layers(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def shard(model: nn.Module, **options: Any) -> None:
    for layer in list_of_layers(model):
        fully_shard(layer, **options)
    fully_shard(model, **options)


def whole(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def backward(packed: nn.Module, packs: list[ppcompile.PackedBatch], share: float) -> list[Tensor]:
    """The log-probabilities of each pack; gradients of ``share`` times their sum."""
    found = []
    for batch in packs:
        out = packed(batch)
        (share * out.logps.sum()).backward()
        found.append(out.logps.detach())
    return found


def one_step(parameters: Iterable[nn.Parameter]) -> None:
    torch.optim.AdamW(parameters, lr=0.1).step()


# --------------------------------------------------------------------------- the same numbers


def equals_one_process(name: str, order: str, checkpoint: str | None) -> None:
    rank, model = dist.get_rank(), MODELS[name]()
    packed = ppcompile.wrap(model)
    expected = backward(packed, [pack_of(r) for r in range(WORLD)], 1.0 / WORLD)[rank]
    gradients = {path: p.grad.clone() for path, p in model.named_parameters()}
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    one_step(model.parameters())
    after = {path: p.detach().clone() for path, p in model.named_parameters()}
    names = list(model.state_dict())

    model.load_state_dict(before, strict=False)
    model.zero_grad()
    if order == "shard, wrap":
        shard(model)
    if order == "shard, wrap" or checkpoint:
        packed = ppcompile.wrap(model, checkpoint=checkpoint)
    if order != "shard, wrap":
        shard(packed if order == "wrap, shard the wrapped" else model)
    assert list(packed.state_dict()) == names
    assert torch.equal(backward(packed, [pack_of(rank)], 1.0)[0], expected)
    one_step(packed.parameters())
    for path, parameter in packed.named_parameters():
        assert torch.equal(whole(parameter.grad), gradients[path]), path
        assert torch.equal(whole(parameter), after[path]), path
    assert len(packed._compiled) == 1, "sharding changes nothing in the graph"


@pytest.mark.parametrize(
    ("name", "order", "checkpoint"),
    [
        ("llama", ORDERS[0], None),
        ("llama", ORDERS[1], "layer"),
        ("llama", ORDERS[2], None),
        ("mixed_windows", ORDERS[0], None),
        ("tied_head", ORDERS[1], None),
        ("experts", ORDERS[2], "layer"),
        ("unpacked_rows", ORDERS[2], None),
        ("layers_used_twice", ORDERS[1], "layer"),
    ],
)
def test_forward_gradients_and_step_are_bit_equal(ranks: Ranks, name: str, order: str, checkpoint: str | None) -> None:
    ranks.run(equals_one_process, name, order, checkpoint)


# --------------------------------------------------------------------------- what is gathered when


def gathers_one_layer_at_a_time() -> None:
    model = MODELS["llama"]()
    packed = ppcompile.wrap(model, checkpoint="layer")
    shard(packed)
    seen: list[set[str]] = []

    def note(*_: Any) -> None:
        whole_ones = (path for path, p in model.named_parameters() if not sharded(p))
        seen.append({path[: len("model.layers.0")] for path in whole_ones if path.startswith("model.layers.")})

    for layer in packed.compiled().graph.layers.values():
        layer.body.register_forward_pre_hook(note)
    logps = packed(pack_of(dist.get_rank())).logps
    assert seen == [{"model.layers.0"}, {"model.layers.1"}]
    assert all(sharded(p) for p in model.model.layers.parameters())
    logps.sum().backward()  # computes both layers again, each when its turn has come
    assert seen[2:] == [{"model.layers.1"}, {"model.layers.0"}]
    assert all(sharded(p) and sharded(p.grad) for p in model.parameters())


def sharded(tensor: Tensor | None) -> bool:
    return isinstance(tensor, DTensor)


def test_one_layer_is_whole_at_a_time(ranks: Ranks) -> None:
    ranks.run(gathers_one_layer_at_a_time)


def groups_of_any_modules() -> None:
    """The attention and the MLP of each layer apart, norm and head as one group, the embedding alone."""
    rank, model = dist.get_rank(), MODELS["llama"]()
    packed = ppcompile.wrap(model)
    expected = backward(packed, [pack_of(r) for r in range(WORLD)], 1.0 / WORLD)[rank]
    gradients = {path: p.grad.clone() for path, p in model.named_parameters()}
    model.zero_grad()
    fully_shard(model.model.embed_tokens)
    for layer in model.model.layers:
        fully_shard(layer.self_attn)
        fully_shard(layer.mlp)
        fully_shard(layer)
    fully_shard([model.model.norm, model.lm_head])
    fully_shard(packed)
    for _ in range(2):  # accumulated without exchange, then with
        packed.zero_grad()
        packed.set_requires_gradient_sync(False)
        backward(packed, [pack_of(rank)], 0.5)
        packed.set_requires_gradient_sync(True)
        assert torch.equal(backward(packed, [pack_of(rank)], 0.5)[0], expected)
        for path, parameter in packed.named_parameters():
            assert torch.equal(whole(parameter.grad), gradients[path]), path


def test_any_modules_can_be_sharded_and_gradients_accumulate(ranks: Ranks) -> None:
    ranks.run(groups_of_any_modules)


# --------------------------------------------------------------------------- mixed precision


def mixed_precision(order: str) -> None:
    """Equal to a model whose parameters are bfloat16; beside the eager unpacked model, judged as low precision is."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    top = dataclasses.replace(policy, output_dtype=torch.float32)
    model = MODELS["llama"]()
    packed = ppcompile.wrap(model)
    batch = pack_of(0)
    exact = packed(batch).token_logps.detach()
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(packed if "wrapped" in order else model, mp_policy=top)
    out = packed(batch)
    assert out.token_logps.dtype == torch.float32
    weights = {
        node.name: node.meta["val"] for layer in packed.compiled().graph.layers.values() for node in inputs(layer)
    }
    assert {w.dtype for name, w in weights.items() if name.endswith("weight")} == {torch.bfloat16}
    low = MODELS["llama"]()
    for parameter in low.parameters():
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(out.token_logps, ppcompile.wrap(low)(batch).token_logps)
    out.logps.sum().backward()
    assert all(whole(p.grad).dtype == torch.float32 for p in model.parameters())
    if "wrapped" not in order:  # the model's own forward gathers only what was sharded as the model
        with torch.no_grad():
            theirs, again = unpacked_logps(model, batch), unpacked_logps(model, batch, extend=9)
        rounding = (theirs - exact).abs().max()
        assert rounding > 1e-3, "the yardstick should be that of low precision"
        assert (out.token_logps - theirs).abs().max() <= max((again - theirs).abs().max(), rounding)


def inputs(layer: Any) -> list[Any]:
    return [node for node in layer.body.graph.nodes if node.op == "placeholder"]


@pytest.mark.parametrize("order", ORDERS[:2])
def test_mixed_precision_is_the_models_own(ranks: Ranks, order: str) -> None:
    ranks.run(mixed_precision, order)


class BorrowingBlock(zoo.Block):
    """Scales by a parameter of the model around it, which is none of the arguments that are cast for a block."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(zoo.FusedAttention(32, 4), 32)
        self.__dict__["owner"] = owner

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.__dict__["owner"].scale


class Lending(zoo.PlainGPT):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + 1e-4 * torch.arange(32.0))
        self.blocks = nn.ModuleList(BorrowingBlock(self) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.float()))


def casts_where_the_model_does(policy: MixedPrecisionPolicy, leaves: torch.dtype) -> None:
    model = zoo.sharpen(Lending()).eval()
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model)
    seen: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
    model(torch.tensor([[5, 9, 3]]))
    assert seen == [leaves] * 2
    packed = ppcompile.wrap(model)
    seen.clear()
    for layer in packed.compiled().graph.layers.values():
        layer.body.register_forward_hook(lambda _module, _args, outputs: seen.extend(o.dtype for o in outputs))
    packed(pack_of(dist.get_rank()))
    assert seen == [leaves] * 2


@pytest.mark.parametrize("output_dtype", [None, torch.bfloat16])
def test_casts_are_made_where_the_model_makes_them(ranks: Ranks, output_dtype: torch.dtype | None) -> None:
    """A block of bfloat16 times a scale of float32 is of float32, unless it is cast back."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=output_dtype)
    ranks.run(casts_where_the_model_does, policy, output_dtype or torch.float32)


# --------------------------------------------------------------------------- refused, by name


class ReadsAnothersWeight(zoo.PlainGPT):
    """Scales by the first block's norm after the last block."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x) * self.blocks[0].norm1.weight)


def refuses() -> None:
    batch = pack_of(0)

    model = zoo.EXACT["plain_fused"]()
    packed = ppcompile.wrap(model)
    for module in (model.words, model.places, *model.blocks, model.norm, model.head, packed, model):
        fully_shard(module)
    with pytest.raises(ValueError, match="the model and to its wrapped face"):
        packed(batch)

    packed = ppcompile.wrap(zoo.EXACT["plain_fused"](), compile=True)
    shard(packed.unwrapped)
    with pytest.raises(ValueError, match="compile='layer'"):
        packed(batch)

    packed = ppcompile.wrap(zoo.EXACT["plain_fused"]())
    shard(packed, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"output_dtype=torch\.bfloat16 would round the log-probabilities"):
        packed(batch)

    model = ReadsAnothersWeight()
    shard(model)
    with pytest.raises(ValueError, match=r"'blocks.0.norm1.weight' is sharded where the packed graph reads it"):
        ppcompile.wrap(model)(batch)

    model = zoo.EXACT["plain_fused"]()
    replicate(model)
    with pytest.raises(ValueError, match=r"the model has a hook of torch\.distributed\._composable\.replicate"):
        ppcompile.wrap(model)

    model = zoo.EXACT["plain_fused"]()
    model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), init_device_mesh("cpu", (WORLD,))))
    with pytest.raises(ValueError, match=r"'head.weight' is a DTensor that fully_shard does not manage"):
        ppcompile.wrap(model)


def test_what_cannot_work_says_so(ranks: Ranks) -> None:
    ranks.run(refuses)
