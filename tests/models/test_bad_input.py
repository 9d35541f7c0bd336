"""Bad input: what came in, where, what to do; and nothing is lost."""

from __future__ import annotations

import pytest
import torch
import zoo

import ppcompile


@pytest.fixture(scope="module")
def packed() -> ppcompile.PackedModel:
    return ppcompile.wrap(zoo.EXACT["gpt2"]())


def test_a_token_outside_the_vocabulary(packed: ppcompile.PackedModel) -> None:
    batch = ppcompile.pack([ppcompile.Group([1, 2], [[3, zoo.VOCABULARY]])])
    with pytest.raises(
        ValueError, match=f"token id {zoo.VOCABULARY} is outside the model's vocabulary of {zoo.VOCABULARY}"
    ):
        packed(batch)


def test_a_sequence_longer_than_the_position_table(packed: ppcompile.PackedModel) -> None:
    batch = ppcompile.pack([ppcompile.Group([1] * zoo.POSITIONS, [[3]])])
    with pytest.raises(ValueError, match=f"{zoo.POSITIONS + 1} tokens is longer than the model's {zoo.POSITIONS}"):
        packed(batch)


def test_a_row_longer_than_the_position_table_is_fine(packed: ppcompile.PackedModel) -> None:
    """A pack is longer than its sequences: only positions are limited, not slots."""
    batch = ppcompile.pack([ppcompile.Group([5] * 300, [[6] * 100, [7] * 100, [8] * 200])])
    assert batch.num_slots > zoo.POSITIONS
    assert packed(batch).logps.isfinite().all()


def test_not_a_batch(packed: ppcompile.PackedModel) -> None:
    with pytest.raises(TypeError, match=r"takes a PackedBatch or a padded batch, got str\. .*ppcompile\.pack"):
        packed("text")


def test_a_pack_with_more_beside_it(packed: ppcompile.PackedModel) -> None:
    batch = ppcompile.pack([ppcompile.Group([1], [[2]])])
    with pytest.raises(TypeError, match="a pack holds all that the model needs, and attention_mask came with it"):
        packed(batch, attention_mask=torch.ones(1, 2))


def test_the_wrong_mode_is_refused_when_it_matters() -> None:
    model = zoo._transformers("gpt2", attn_pdrop=0.1)()
    packed = ppcompile.wrap(model)  # in eval mode
    batch = ppcompile.pack([ppcompile.Group([1, 2], [[3]])])
    assert packed(batch).logps.isfinite().all()
    packed.train()
    with pytest.raises(ppcompile.NotPackable, match="dropout in attention while training"):
        packed(batch)


def test_a_batch_on_another_device(packed: ppcompile.PackedModel) -> None:
    batch = ppcompile.pack([ppcompile.Group([1], [[2]])]).to("meta")
    with pytest.raises(ValueError, match="the batch is on meta and the model on cpu"):
        packed(batch)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'fast'; accepted: auto, cascade, flex, reference"):
        ppcompile.wrap(zoo.EXACT["llama"](), backend="fast")


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        ppcompile.wrap(zoo.EXACT["llama"](), fast=True)


def test_autocast_is_refused_not_ignored(packed: ppcompile.PackedModel) -> None:
    batch = ppcompile.pack([ppcompile.Group([1], [[2]])])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"packed under torch\.autocast"):
        packed(batch)


def test_a_model_that_was_moved_is_captured_again() -> None:
    model = zoo.EXACT["llama"]()
    packed = ppcompile.wrap(model)
    batch = ppcompile.pack([ppcompile.Group([1, 5], [[2, 9]])])
    single = packed(batch).logps
    model.double()
    double = packed(batch)
    assert double.token_logps.dtype == torch.float64
    torch.testing.assert_close(double.logps.float(), single, rtol=1e-5, atol=1e-5)
