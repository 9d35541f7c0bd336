"""Layer by layer: what checkpointing keeps, and what torch.compile makes once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch._dynamo.utils import counters

import ppcompile
from ppcompile.verification import unpacked_logps

LAYERS = 4


def batch() -> ppcompile.PackedBatch:
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, zoo.VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    groups = [ppcompile.Group(ids(30), [ids(9), ids(12)]), ppcompile.Group(ids(14), [ids(20), ids(7), ids(5)])]
    return ppcompile.pack(groups, share="tree", pad_to_multiple_of=16)


def kept_for_the_backward(run: Callable[[], Tensor], model: nn.Module) -> tuple[Tensor, int]:
    """The result, and the bytes that autograd saves besides parameters and inputs, each memory counted once."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)  # so that no address is used twice
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), sum(kept.values())


def gradients(packed: ppcompile.PackedModel) -> tuple[dict[str, Tensor], int]:
    packed.zero_grad()
    packed.compiled()  # graphs are made in peace, not under the hooks
    loss, kept = kept_for_the_backward(lambda: packed(batch()).logps.sum(), packed)
    loss.backward()
    return {path: p.grad.clone() for path, p in packed.named_parameters()}, kept


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": zoo._transformers("llama", num_hidden_layers=LAYERS),
    "mixed_windows": zoo._transformers(
        "gemma2", layer_types=zoo._MIXED, num_hidden_layers=LAYERS, sliding_window=8,
        query_pre_attn_scalar=8, attn_logit_softcapping=3.0,
    ),
    "unpacked_rows": zoo._plain(mixer=zoo.Convolution),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_equal_gradients_of_less_memory(name: str) -> None:
    model = MODELS[name]()
    expected, all_of_it = gradients(ppcompile.wrap(model))
    packed = ppcompile.wrap(model, checkpoint="layer")
    with torch.inference_mode():  # what is made here must not stand in the way of gradients later
        packed(batch())
    found, kept = gradients(packed)
    for path, gradient in expected.items():
        assert torch.equal(found[path], gradient), path
    slots, width = batch().num_slots, 32
    layers = len(packed.compiled().graph.layers)
    # What enters each layer, in float32, and the same again for what lies outside the layers.
    assert kept <= 2 * 4 * slots * width * (layers + 1)
    assert kept * 4 < all_of_it


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # the name that trainers still call
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_models_own_setting_is_followed(reentrant: bool) -> None:
    model = MODELS["llama"]().train()
    packed = ppcompile.wrap(model)
    expected, all_of_it = gradients(packed)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found, kept = gradients(packed)
    assert kept * 4 < all_of_it
    assert all(torch.equal(found[path], gradient) for path, gradient in expected.items())
    for layer in model.model.layers[1:]:  # as every_n_layers does
        layer.gradient_checkpointing = False
    assert kept < gradients(packed)[1] < all_of_it
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert gradients(packed.eval())[1] == all_of_it, "transformers models recompute in training only"


def test_a_model_that_calls_checkpoint_itself() -> None:
    """The older kind of checkpointing runs the forward without gradients, which must not end up in the graph."""

    class Checkpointed(zoo.PlainGPT):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
            return self.head(self.norm(x))

    model = zoo.sharpen(Checkpointed()).eval()
    ours, _ = gradients(ppcompile.wrap(model))
    model.zero_grad()
    unpacked_logps(model, batch()).sum().backward()
    for path, parameter in model.named_parameters():
        torch.testing.assert_close(ours[path], parameter.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("option", "accepted"),
    [
        ({"checkpoint": "layers"}, "None, 'layer'"),
        ({"checkpoint": True}, "None, 'layer'"),
        ({"compile": "model"}, "False, True, 'layer'"),
        ({"compile": 1}, "False, True, 'layer'"),
    ],
)
def test_unknown_options_are_named(option: dict[str, Any], accepted: str) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=rf"unknown {name}={value!r}; accepted: {accepted}"):
        ppcompile.wrap(zoo.EXACT["plain_fused"](), **option)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile looks at its inputs'
def test_layers_of_one_kind_are_compiled_once() -> None:
    model = MODELS["llama"]()
    expected, _ = gradients(ppcompile.wrap(model))
    packed = ppcompile.wrap(model, compile="layer", checkpoint="layer")
    torch._dynamo.reset()
    counters.clear()
    for prompt in (70, 131):
        packed(ppcompile.pack([ppcompile.Group([5] * prompt, [[6] * 20, [7] * 9])])).logps.sum().backward()
    found, _ = gradients(packed)
    assert counters["stats"]["unique_graphs"] == 2, "all layers but the last, and the last"
    for path, gradient in expected.items():
        torch.testing.assert_close(found[path], gradient, rtol=1e-3, atol=1e-3)
