"""The packed graph calls its layers, and computes what it computed before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn

import ppcompile
from ppcompile.capture import capture
from ppcompile.layers import Runner
from ppcompile.passes.base import LAYOUT_INPUTS, PackGraph, input_nodes
from ppcompile.pipeline import passes
from ppcompile.sharding import Sharding


def packed_graph(model: nn.Module, *, outlined: bool) -> PackGraph:
    graph = capture(model)
    for run in passes()[: None if outlined else -1]:
        run(graph)
    return graph


def batch() -> ppcompile.PackedBatch:
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, zoo.VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    return ppcompile.pack([ppcompile.Group(ids(20), [ids(5), ids(9)]), ppcompile.Group(ids(3), [ids(7)])])


def values(graph: PackGraph, model: nn.Module) -> Tensor:
    run = Runner(graph, model, checkpoint=None, compile=False)
    return run({name: getattr(batch(), name) for name in LAYOUT_INPUTS}, Sharding(model, model))


class Layers(nn.Module):
    """A model whose ``run(layers, x, places)`` is up to the test."""

    def __init__(self, run: Callable[..., Tensor], count: int = 3, **options: float) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(zoo.VOCABULARY, 32), nn.Embedding(zoo.POSITIONS, 32)
        self.layers = nn.ModuleList(zoo.Block(zoo.FusedAttention(32, 4), 32) for _ in range(count))
        self.head = nn.Linear(32, zoo.VOCABULARY, bias=False)
        self.run = run

    def forward(self, ids: Tensor) -> Tensor:
        places = self.places(torch.arange(ids.shape[1]))
        return self.head(self.run(self.layers, self.words(ids), places))


def in_turn(layers: nn.ModuleList, x: Tensor, places: Tensor) -> Tensor:
    x = x + places
    for layer in layers:
        x = layer(x)
    return x


def twice(layers: nn.ModuleList, x: Tensor, places: Tensor) -> Tensor:
    return in_turn(layers, in_turn(layers, x, places), places)


def skipping(layers: nn.ModuleList, x: Tensor, places: Tensor) -> Tensor:
    """What the first layer made is read by all, with its own weight between the layers."""
    first = layers[0](x + places)
    for layer in layers[1:]:
        x = layer(x + first) * layers[0].norm1.weight
    return x


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: zoo.EXACT[name] for name in ("llama", "gemma2", "bloom", "gpt_oss")},
    "in_turn": lambda: zoo.sharpen(Layers(in_turn)).eval(),
    "twice": lambda: zoo.sharpen(Layers(twice)).eval(),
    "skipping": lambda: zoo.sharpen(Layers(skipping)).eval(),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers(name: str) -> None:
    model = MODELS[name]()
    flat, outlined = packed_graph(model, outlined=False), packed_graph(model, outlined=True)
    assert not flat.layers
    assert len(outlined.layers) >= 2
    assert torch.equal(values(flat, model), values(outlined, model))


def test_layers_read_their_own_state_and_the_rest_stays_outside() -> None:
    model = MODELS["llama"]()
    graph = packed_graph(model, outlined=True)
    assert [layer.path for layer in graph.layers.values()] == ["model.layers.0", "model.layers.1"]
    for layer in graph.layers.values():
        assert sorted(layer.state) == sorted(
            f"{layer.path}.{n}" for n, _ in model.get_submodule(layer.path).named_parameters()
        )
    assert {graph.state[n.name] for n in input_nodes(graph.graph) if n.name in graph.state} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.rotary_emb.inv_freq",
    }


def bodies(graph: PackGraph) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for layer in graph.layers.values():
        found.setdefault(id(layer.body), []).append(layer.path.rpartition(".")[2])
    return list(found.values())


def test_layers_that_compute_the_same_share_one_body() -> None:
    """The last one does not: only scored slots are computed after its attention."""
    assert bodies(packed_graph(MODELS["in_turn"](), outlined=True)) == [["0", "1"], ["2"]]
    assert bodies(packed_graph(MODELS["gemma2"](), outlined=True)) == [["0", "2"], ["1"], ["3"]]  # windows alternate


@pytest.mark.parametrize("changed", ["eps", "heads", "dtype", "width"])
def test_lookalikes_do_not(changed: str) -> None:
    model = Layers(in_turn).eval()
    if changed == "eps":
        model.layers[1].norm1.eps *= 1 + 1e-12
    elif changed == "heads":
        model.layers[1].attention.heads = 2
    elif changed == "width":
        model.layers[1].mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    else:
        model.layers[1].norm1.double()
        model.layers[1].norm1.forward = lambda x: nn.functional.layer_norm(
            x.double(), (32,), model.layers[1].norm1.weight, model.layers[1].norm1.bias
        ).float()
    assert bodies(packed_graph(model, outlined=True)) == [["0"], ["1"], ["2"]]


def test_a_layer_that_runs_twice_is_called_twice() -> None:
    graph = packed_graph(MODELS["twice"](), outlined=True)
    assert [layer.path for layer in graph.layers.values()] == [f"layers.{n}" for n in (0, 1, 2, 0, 1, 2)]


def test_what_is_read_outside_a_layer_is_an_input_of_the_whole_graph() -> None:
    graph = packed_graph(MODELS["skipping"](), outlined=True)
    outside = {graph.state[n.name] for n in input_nodes(graph.graph) if n.name in graph.state}
    assert "layers.0.norm1.weight" in outside
    assert "layers.1.norm1.weight" not in outside


class PreparesTable(nn.Module):
    """A layer that prepares the table of positions unless a layer before it did."""

    def __init__(self) -> None:
        super().__init__()
        self.block = zoo.Block(zoo.FusedAttention(32, 4), 32)

    def forward(self, x: Tensor, places: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
        table = (places * 2).unsqueeze(0) if table is None else table
        return self.block(x + table), table


def test_a_table_that_the_first_layer_prepares_for_all_is_made_outside() -> None:
    def run(layers: nn.ModuleList, x: Tensor, places: Tensor) -> Tensor:
        table = None
        for layer in layers:
            x, table = layer(x, places, table)
        return x

    model = Layers(run)
    model.layers = nn.ModuleList(PreparesTable() for _ in range(3))
    assert bodies(packed_graph(model.eval(), outlined=True)) == [["0", "1"], ["2"]]


def test_a_model_without_layers_is_left_as_it_is() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(zoo.VOCABULARY, 32), nn.Linear(32, zoo.VOCABULARY)
            self.block = zoo.Block(zoo.FusedAttention(32, 4), 32)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.block(self.words(ids)))

    model = One().eval()
    assert not packed_graph(model, outlined=True).layers
    with pytest.raises(ValueError, match=r"checkpoint='layer' needs a list of layers"):
        ppcompile.wrap(model, checkpoint="layer")


def test_the_report_counts_and_prints_what_is_in_layers() -> None:
    flat, outlined = (packed_graph(MODELS["gemma2"](), outlined=o) for o in (False, True))
    counts = outlined.op_counts()
    counts["getitem"] = flat.op_counts()["getitem"]  # one for each result of a layer
    assert counts == flat.op_counts()
    text = outlined.readable()
    assert text.count("torch.ops.ppcompile.prefix_attention") == 3, "three bodies for four layers"
    assert "# model.layers.0, model.layers.2" in text
