"""One model, several backends: the compiled graph, FlexAttention inside it, and one artifact for all lengths."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch._dynamo.utils import counters

import ppcompile
from ppcompile.verification import unpacked_logps

TOLERANCE = 2e-5


def batches() -> list[ppcompile.PackedBatch]:
    """Rows of more than one block, of four lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(0, zoo.VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    return [
        ppcompile.pack([ppcompile.Group(ids(prompt), [ids(40), ids(9)]), ppcompile.Group(ids(30), [ids(50)])])
        for prompt in (70, 131, 200, 290)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_fused", "mistral"])
def test_flex_in_the_graph_one_artifact(name: str) -> None:
    if name == "plain_fused" and torch.__version__ < "2.13":
        pytest.skip("this torch's FlexAttention on the CPU takes no query, key and value that are views of one buffer")
    model = zoo.EXACT[name]()
    packed = ppcompile.wrap(model, backend="flex", compile=True)
    torch._dynamo.reset()
    counters.clear()
    for batch in batches():
        with torch.no_grad():
            assert (packed(batch).token_logps - unpacked_logps(model, batch)).abs().max() <= TOLERANCE
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_the_whole_step_compiles_on_the_cpu_with_gradients() -> None:
    model = zoo.EXACT["plain_fused"]()
    eager, compiled = ppcompile.wrap(model), ppcompile.wrap(model, compile=True)
    torch._dynamo.reset()
    counters.clear()
    for batch in batches()[:3]:
        gradients = []
        for packed in (eager, compiled):
            model.zero_grad()
            packed(batch).logps.sum().backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        for name, expected in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1


def test_block_lists_are_made_once_per_window() -> None:
    graph = ppcompile.wrap(zoo.EXACT["gemma3_text"](), backend="flex").compiled().graph
    counts = graph.op_counts()
    assert counts["ppcompile.block_lists.default"] == 2
    assert counts["flex_prefix_attention"] == 4
    assert "ppcompile.prefix_attention.default" not in counts


def test_flex_says_why_it_cannot_run_sinks_on_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"backend 'flex' cannot run this model: .*sinks"):
        ppcompile.wrap(zoo.EXACT["gpt_oss"](), backend="flex")


def test_every_site_says_why_it_has_its_backend() -> None:
    sites = ppcompile.wrap(zoo.EXACT["llama"]()).compiled().graph.sites
    assert {(site.backend, site.why) for site in sites} == {("cascade", "best on cpu")}
