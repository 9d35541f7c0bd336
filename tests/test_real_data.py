"""The DPO loop of the example on real preference data: packed and unpacked give the same losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import dpo
from ppcompile.data import read_preferences, tokenize

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data (real preference sets) is not there")


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo_en", "qa_feedback"])
def test_the_loop_gives_the_unpacked_losses(name: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizer")
    records = read_preferences(SHARED / f"{name}.jsonl.gz", unscored="best-first", limit=40)
    groups = [tokenize(r, tokenizer, max_prompt_tokens=700, max_response_tokens=300) for r in records if r.pairs]
    settings = dpo.Settings(steps=3, groups_per_step=4, max_tokens=2500, learning_rate=1e-4, warmup=1, eval_every=3)
    rows = {}
    for packing in (dpo.Packing.on, dpo.Packing.off):
        out = tmp_path / packing.value
        out.mkdir()
        training, held_out = groups[:12], groups[12:16]
        dpo.train(
            small_llama(), training, held_out, settings, packing=packing, out=out, checkpoint_every=0, resume=False
        )
        rows[packing] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    on, off = rows[dpo.Packing.on], rows[dpo.Packing.off]
    assert [row["pairs"] for row in on] == [row["pairs"] for row in off]
    assert sum(row["tokens"] for row in on) < sum(row["tokens"] for row in off)
    for packed, unpacked in zip(on, off, strict=True):
        assert packed["loss"] == pytest.approx(unpacked["loss"], abs=2e-4)
        assert packed["grad_norm"] == pytest.approx(unpacked["grad_norm"], rel=5e-3)
