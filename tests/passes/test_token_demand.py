"""After the last attention only scored slots are computed, and the numbers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import ppcompile
from ppcompile.passes.base import PackGraph, is_op, shape_of
from ppcompile.passes.token_demand import token_demand
from ppcompile.pipeline import passes
from ppcompile.verification import unpacked_logps


def before_demand(model: nn.Module, captured: Any) -> PackGraph:
    graph: PackGraph = captured(model)
    for run in passes("reference")[1:]:
        if run is token_demand:
            return graph
        run(graph)
    raise AssertionError("token_demand is no pass")


def products(graph: PackGraph) -> list[bool]:
    """For each linear op in order: True if it runs on scored slots only."""
    linear = [n for n in graph.graph.nodes if is_op(n, "aten.linear", "aten.addmm")]
    return [any(graph.is_scored(size) for size in shape_of(node)) for node in linear]


def test_the_last_layer_runs_on_scored_slots(captured: Any) -> None:
    graph = before_demand(zoo._plain()(), captured)
    before = products(graph)
    result = token_demand(graph)
    after = products(graph)
    assert before == [False] * 8  # two layers of qkv, out, and two of the MLP
    assert after == [False] * 5 + [True] * 3
    assert result.changed >= 8
    assert any("blocks.1.mlp" in line for line in result.matched)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_last_projection_of_every_kind_moves(name: str, captured: Any) -> None:
    graph = before_demand(zoo.EXACT[name](), captured)
    token_demand(graph)
    assert products(graph)[-1]


class Twice(nn.Module):
    """Hidden states that the selection reads and that attention reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(zoo.VOCABULARY, 32), nn.Linear(32, zoo.VOCABULARY)
        self.attention, self.first, self.norm = zoo.FusedAttention(32, 4), nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first(self.words(ids))  # needed by attention for every slot
        y = self.attention(x) + x.unsqueeze(2).mean(2) + x.view(1, -1, 4, 8).transpose(2, 3).flatten(2)
        return self.head(self.norm(torch.where(y > 0, y, torch.zeros_like(y)) + y.mean(-1, keepdim=True)))


def test_what_attention_needs_stays_whole_and_numbers_hold(captured: Any) -> None:
    model = zoo.sharpen(Twice()).eval()
    graph = before_demand(model, captured)
    token_demand(graph)
    assert products(graph) == [False, False, True]
    batch = ppcompile.pack([ppcompile.Group([3, 4, 5, 6], [[6, 7], [8]]), ppcompile.Group([9], [[8, 7, 6]])])
    torch.testing.assert_close(ppcompile.wrap(model)(batch).token_logps, unpacked_logps(model, batch))


def test_nothing_to_move(captured: Any) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(zoo.VOCABULARY, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids) @ self.words.weight.T

    graph = before_demand(Bare(), captured)
    token_demand(graph)
    batch = ppcompile.pack([ppcompile.Group([3, 4], [[6, 7], [8]])])
    model = Bare()
    torch.testing.assert_close(ppcompile.wrap(model)(batch).token_logps, unpacked_logps(model, batch))
