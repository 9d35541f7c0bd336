"""What the executed graph must not contain, asserted on the graph and on what really runs."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode

import ppcompile
from ppcompile.passes.base import shape_of


@pytest.mark.parametrize("name", zoo.EXACT)
def test_no_scores_no_masks_no_logits(name: str) -> None:
    graph = ppcompile.wrap(zoo.EXACT[name]()).compiled().graph
    for node in graph.nodes():
        shape = shape_of(node)
        tokens = [size for size in shape if graph.mentions_length(size) or graph.is_scored(size)]
        assert len(tokens) <= 1, f"{node.format_node()} has two axes of tokens: {shape}"
        assert not tokens or zoo.VOCABULARY not in shape, f"{node.format_node()} has logits for every token: {shape}"
    assert graph.sites


class Largest(TorchDispatchMode):
    """The largest tensor any op returns, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.where = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() > self.elements:
                self.elements, self.where = tensor.numel(), f"{func}: {list(tensor.shape)}"
        return result


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "mistral"])
def test_nothing_that_runs_is_quadratic(name: str) -> None:
    model = zoo.EXACT[name]()
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(0, zoo.VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    batch = ppcompile.pack([ppcompile.Group(ids(400), [ids(60), ids(50)]) for _ in range(8)])
    packed = ppcompile.wrap(model)
    with Largest() as seen:
        loss = packed(batch).logps.sum()
        # torch.func, which pulls gradients back through score programs, cannot run under a dispatch mode;
        # tests/runtime/test_attention.py measures that part.
        if name in ("llama", "mistral"):  # neither score programs nor a head program
            loss.backward()
    assert batch.num_slots > 4000
    assert seen.elements < batch.num_slots**2 / 4, seen.where


def test_every_pass_reports() -> None:
    compiled = ppcompile.wrap(zoo.EXACT["gemma2"]()).compiled()
    results = {stage.name: stage.result for stage in compiled.stages}
    assert len(results["recognize_attention"].matched) == len(compiled.graph.sites) == 4
    assert results["rewrite_attention"].changed == 4
    assert results["rewrite_positions"].changed >= 1
    assert results["insert_epilogue"].matched == ["head: mul(tanh(div(linear(x, c0), 4.0)), 4.0)"]
    assert results["token_demand"].changed > 0
    assert [site.meaning.mask_class for site in compiled.graph.sites] == ["window(8)", "causal"] * 2


def test_repeated_keys_are_taken_before_the_repetition() -> None:
    sites = ppcompile.wrap(zoo.EXACT["llama"]()).compiled().graph.sites
    assert {(site.heads, site.key_heads) for site in sites} == {(4, 2)}


def test_sinks_and_windows_of_gpt_oss() -> None:
    sites = ppcompile.wrap(zoo.EXACT["gpt_oss"]()).compiled().graph.sites
    assert [site.meaning.window for site in sites] == [8, 0, 8, 0]
    assert all(site.sinks is not None for site in sites)


def test_alibi_is_a_score_of_head_and_position() -> None:
    sites = ppcompile.wrap(zoo.EXACT["bloom"]()).compiled().graph.sites
    (score,) = {site.meaning.score_class for site in sites}
    assert score in ("add(s, mul(at(c0, h), k))", "add(s, mul(at(c0, h), sub(add(k, 1), 1)))")  # older transformers
