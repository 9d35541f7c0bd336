"""The second net must catch what it is there for: break the packed side on purpose, and it says so."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import zoo

import ppcompile
from ppcompile import verification
from ppcompile.verification import Mismatch, example_batch


@pytest.fixture(scope="module")
def packed() -> ppcompile.PackedModel:
    return ppcompile.wrap(zoo.EXACT["llama"]())


@pytest.fixture
def batch(packed: ppcompile.PackedModel) -> ppcompile.PackedBatch:
    return example_batch(packed)


def test_the_example_has_what_can_go_wrong(batch: ppcompile.PackedBatch) -> None:
    assert batch.num_slots > batch.num_tokens, "padding"
    assert (batch.segments[:, 3] >= 0).sum() >= 6, "branches"
    assert len(batch.scored_index) > len(batch.targets), "tokens that responses share"
    assert len(set(batch.lengths.tolist())) > 3, "unequal responses"


def test_an_exact_model_passes(packed: ppcompile.PackedModel, batch: ppcompile.PackedBatch) -> None:
    report = ppcompile.verify(packed, batch)
    assert report.ok
    assert report.independence <= 1e-6
    assert "packed equals eager unpacked" in str(report)


def spoil_positions(batch: ppcompile.PackedBatch) -> dict[str, torch.Tensor]:
    return {"position_ids": torch.arange(batch.num_slots)[None]}


def spoil_visibility(batch: ppcompile.PackedBatch) -> dict[str, torch.Tensor]:
    whole = torch.tensor([[0, batch.num_slots, batch.num_slots, -1]])
    return {"subtree_end": torch.full_like(batch.subtree_end, batch.num_slots), "segments": whole}


def spoil_predecessors(batch: ppcompile.PackedBatch) -> dict[str, torch.Tensor]:
    """Off by one: every token is predicted from the slot after the right one."""
    return {"predecessors": (batch.predecessors + 1).clamp(max=batch.num_slots - 1)}


@pytest.mark.parametrize("spoil", [spoil_positions, spoil_visibility, spoil_predecessors])
def test_a_spoiled_layout_is_caught(packed: ppcompile.PackedModel, batch: ppcompile.PackedBatch, spoil) -> None:
    class Spoiled(ppcompile.PackedModel):
        def forward(self, given: ppcompile.PackedBatch) -> ppcompile.PackedOutput:
            return super().forward(dataclasses.replace(given, **spoil(given)))

    with pytest.raises(Mismatch) as caught:
        ppcompile.verify(Spoiled(packed.unwrapped, backend="reference"), batch)
    report = caught.value.report
    assert not report.ok
    assert report.forward > 1e-2
    assert "does NOT equal" in str(caught.value)
    if spoil is spoil_visibility:
        assert report.independence > 1e-2


def test_not_a_number_is_a_mismatch(packed: ppcompile.PackedModel) -> None:
    report = ppcompile.verify(packed)
    assert not dataclasses.replace(report, forward=float("nan")).ok
    assert not dataclasses.replace(report, gradient=float("nan")).ok
    assert not dataclasses.replace(report, independence=float("nan")).ok


def test_wrap_verifies_on_request() -> None:
    model = zoo.EXACT["plain_fused"]()
    assert ppcompile.wrap(model, verify=True).compiled().graph.sites


def test_the_probe_sees_a_leak_between_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed model whose second response sees the first one: the probe alone must notice."""
    packed = ppcompile.wrap(zoo.EXACT["plain_fused"](), backend="reference")
    batch = ppcompile.pack([ppcompile.Group([1, 2, 3], [[4, 5], [6, 7]])])
    assert verification._independence(packed, batch, packed(batch).token_logps.detach()) == 0.0
    forward, everything = packed.forward, torch.full_like(batch.subtree_end, batch.num_slots)
    monkeypatch.setattr(packed, "forward", lambda b: forward(dataclasses.replace(b, subtree_end=everything)))
    assert verification._independence(packed, batch, packed(batch).token_logps.detach()) > 1e-3
