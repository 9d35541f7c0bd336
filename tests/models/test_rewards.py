"""Models that return one value per sequence: exact, at the token that the eager model takes."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

import ppcompile
from ppcompile.verification import unpacked_rewards


def classifier(kind: str, **options: object) -> nn.Module:
    config = CONFIG_MAPPING[kind](**{**zoo._BASE, "num_labels": 1, **options})
    return zoo.sharpen(AutoModelForSequenceClassification.from_config(config)).eval()


class ValueHead(nn.Module):
    """A head on the last token, with something after it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = zoo.PlainGPT(), nn.Linear(zoo.VOCABULARY, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.head(self.body(ids)[:, -1]))


def batch() -> ppcompile.PackedBatch:
    groups = [
        ppcompile.Group([5, 6, 7, 8], [[9, 10, 0], [9, 11], [0, 0]]),
        ppcompile.Group([12], [[13], [14, 15, 16, 0, 0]]),
    ]
    return ppcompile.pack(groups, share="tree", pad_to_multiple_of=16)


@pytest.mark.parametrize("padding", [0, None], ids=["passes over padding tokens", "the last token"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_transformers_classifiers(kind: str, padding: int | None) -> None:
    model = (
        classifier(kind, pad_token_id=padding, attn_pdrop=0.0)
        if kind == "gpt2"
        else classifier(kind, pad_token_id=padding)
    )
    packed = ppcompile.wrap(model, verify=True)
    out = packed(batch())
    assert out.rewards.shape == (5,)
    assert out.rewards.dtype == torch.float32
    torch.testing.assert_close(out.rewards, unpacked_rewards(model, batch()), atol=2e-5, rtol=1e-5)
    assert not hasattr(out, "logps")


def test_a_head_of_ones_own_with_ops_after_it() -> None:
    packed = ppcompile.wrap(zoo.sharpen(ValueHead()).eval(), verify=True)
    assert packed(batch()).rewards.abs().max() <= 1


def test_several_outputs() -> None:
    model = classifier("llama", num_labels=3)
    assert ppcompile.wrap(model, verify=True)(batch()).rewards.shape == (5, 3)


def test_gradients_are_those_of_a_pairwise_loss() -> None:
    model = classifier("llama")
    packed = ppcompile.wrap(model)

    def gradients(rewards: Tensor) -> list[Tensor]:
        loss = -torch.nn.functional.logsigmoid(rewards[0] - rewards[1])
        return list(torch.autograd.grad(loss, list(model.parameters())))

    ours, theirs = gradients(packed(batch()).rewards), gradients(unpacked_rewards(model, batch()))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_the_last_layer_is_computed_at_the_last_tokens_only() -> None:
    compiled = ppcompile.wrap(classifier("llama")).compiled()
    assert next(stage for stage in compiled.stages if stage.name == "token_demand").result.changed > 5


class MeanPool(ValueHead):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(ids).mean(1))


class FirstToken(ValueHead):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(ids)[:, 0])


@pytest.mark.parametrize("kind", [MeanPool, FirstToken])
def test_other_ways_of_pooling_are_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(ppcompile.NotPackable, match="pooled otherwise"):
        ppcompile.wrap(kind().eval())
